"""What to expect before renting a GPU: every GEMM of a training step, and its predicted time.

Nothing here touches a GPU: models are traced on the meta device and times come from a roofline
whose efficiencies are measured (bench/results) or published, each with its source.
"""

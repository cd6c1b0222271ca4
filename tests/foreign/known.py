"""Where a converted layer is meant to differ from torch's own, and why.

Pattern of case names (as ``fnmatch`` has them) -> reason. A case that a pattern names may fail;
every other failure is a defect.
"""

KNOWN: dict[str, str] = {
    "transformers Falcon *": (
        "FalconLinear is a subclass and may compute something else: convert_ leaves every layer "
        "of the model dense and raises, naming the reason"
    ),
}

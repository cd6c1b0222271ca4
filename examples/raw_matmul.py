"""D = A @ B with A 2:4 sparse, through nothing but pointers.

On a GPU:            python examples/raw_matmul.py
On the CPU emulator: CUSPARSELT_LIBRARY=build/emulator/.../libcusparseLt.so.0 (host memory then)
"""

import pycusparselt as cslt
import torch


def main(m: int = 256, n: int = 128, k: int = 512) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((m, k), (k, n)))
    d = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    with cslt.Handle(cslt.load()) as handle:  # closing it closes all that is built on it
        bf16 = cslt.DataType.R_16BF
        mat_a = cslt.MatDescriptor.structured(handle, m, k, dtype=bf16)
        mat_b = cslt.MatDescriptor.dense(handle, k, n, dtype=bf16)
        mat_d = cslt.MatDescriptor.dense(handle, m, n, dtype=bf16)
        matmul = cslt.MatmulDescriptor(handle, a=mat_a, b=mat_b, c=mat_d)
        plan = cslt.MatmulPlan(handle, matmul, cslt.AlgSelection(handle, matmul))
        matmul.prune(a.data_ptr(), a.data_ptr(), cslt.PruneAlg.STRIP, stream)
        packed, buffer, workspace = (
            torch.empty(size, dtype=torch.uint8, device=device)
            for size in (*plan.compressed_size(), plan.workspace_size)
        )
        plan.compress(a.data_ptr(), packed.data_ptr(), buffer.data_ptr(), stream)
        pointers = (packed.data_ptr(), b.data_ptr(), 0.0, d.data_ptr(), d.data_ptr())
        plan.matmul(1.0, *pointers, workspace.data_ptr(), stream)
        expected = a.double() @ b.double()  # also waits for the stream
    return float((d.double() - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    print(f"largest error relative to the largest element: {main():.1e}")

"""Words of the domain as frozen values: what a call is, before anyone decides how to run it.

Glossary, used from Python to the kernels: ``T`` tokens, ``top_k`` experts per token,
``E`` local experts, ``H`` hidden size, ``I`` intermediate size, ``S = T * top_k`` slots
(slot ``t * top_k + j`` is the j-th choice of token t). A *row* is a live slot after
sorting by expert. Inside a kernel ``N`` and ``K`` are the output and inner size of a GEMM.
"""

"""What an import costs, and what works where Triton is missing."""


def test_import_of_the_package_loads_neither_torch_nor_triton(python):
    loaded = python(
        "import sys, fusedmoe\n"
        "dir(fusedmoe), fusedmoe.__version__, fusedmoe.ShapeError\n"
        "print(sorted({'torch', 'triton', 'numpy', 'transformers', 'typer', 'rich'} & set(sys.modules)))"
    )
    assert loaded.strip() == "[]"


def test_the_torch_backend_and_checkpoints_load_no_optional_package(python):
    loaded = python(
        "import sys, fusedmoe, fusedmoe.nn, fusedmoe.checkpoint, fusedmoe.backends.torch, fusedmoe.plan.planner\n"
        "print(sorted({'transformers', 'typer', 'rich', 'safetensors', 'fusedmoe.backends.triton'} & set(sys.modules)))"
    )
    assert loaded.strip() == "[]"


def test_without_triton_the_layer_runs_on_the_torch_backend(python):
    error = python(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # import triton raises ImportError
        "import torch, fusedmoe\n"
        "x, w13, w2 = torch.randn(5, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)\n"
        "topk = fusedmoe.softmax_topk(torch.randn(5, 3), 2, renormalize=True)\n"
        "expected = fusedmoe.reference.fused_experts(x, w13, w2, *topk)\n"
        "for backend in ('torch', 'auto', None):\n"
        "    out = fusedmoe.fused_experts(x, w13, w2, *topk, backend=backend)\n"
        "    print(float((out - expected).abs().max() / expected.abs().max()))\n"
    )
    assert all(float(line) < 1e-5 for line in error.split()), error
    assert len(error.split()) == 3


def test_without_triton_the_tuner_says_that_there_is_nothing_to_tune(python):
    said = python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from fusedmoe.bench import shape_of\n"
        "from fusedmoe.errors import UnsupportedError\n"
        "from fusedmoe.tune import tune\n"
        "try:\n"
        "    list(tune(shape_of('4,2,64,64'), dtype=torch.float32, device=torch.device('cpu')))\n"
        "except UnsupportedError as error:\n"
        "    print(error)\n"
    )
    assert "wanted a GPU with Triton" in said

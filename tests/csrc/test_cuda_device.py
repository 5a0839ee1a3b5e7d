"""libparetofuse on a real CUDA driver: kernels compiled for this device merge to the CPU's results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.cpplib import Library
from tests.support.cuda import STORES, assert_cpu_results
from tests.support.process import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device here"
    ),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    major, minor = torch.cuda.get_device_capability()
    run(sys.executable, "-m", "paretofuse.kernels.aot", "--arch", f"sm_{major}{minor}", "-o", folder)
    return folder


@pytest.mark.parametrize("kind", STORES)
def test_results_are_the_cpus(library: Library, kernels: Path, tmp_path: Path, kind: str) -> None:
    engine = library.open(STORES[kind](tmp_path / "store"))
    cuda = engine.cuda(kernels, "libcuda.so.1", torch.cuda.current_device())
    stream = torch.cuda.Stream()
    random = np.random.default_rng(1)
    count = len(engine.names("objective"))
    for where in (0, stream.cuda_stream):
        for _ in range(20):
            preference = [float(share) for share in random.dirichlet(np.ones(count))]
            cuda.switch(preference, where)
        engine.switch(preference)
        assert_cpu_results(cuda.tensors(where), engine.tensors(), bits=False)
        shape = len(engine.names("group")), len(engine.names("plane"))
        weights = random.normal(size=shape).astype(np.float32)
        engine.switch_weights(weights)
        cuda.switch_weights(weights, where)
        assert_cpu_results(cuda.tensors(where), engine.tensors(), bits=False)
    cuda.close()

"""Which implementation an operation takes on which device; no GPU and no plugin is needed to ask."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.errors import ImplementationError
from pallas_kernels.gpu_chip import gpu_chip
from pallas_kernels.grouped_matmul import grouped_swiglu
from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.target import target


def compiled_for(platform: str, kind: str) -> contextlib.AbstractContextManager:
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device))


def reference() -> None:
    """Stands for plain XLA."""


def on_tpu() -> None:
    """Stands for a kernel."""


def on_gpu() -> None:
    """Stands for a kernel."""


def on_cpu() -> None:
    """Stands for another form of the reference."""


DEVICES = {
    "v5e": ("tpu", "TPU v5 lite"),
    "h100": ("gpu", "NVIDIA H100 80GB HBM3"),
    "gh200": ("gpu", "NVIDIA GH200 480GB"),
    "b200": ("gpu", "NVIDIA B200"),
    "a100": ("gpu", "NVIDIA A100-SXM4-80GB"),
    "mi300x": ("gpu", "AMD Instinct MI300X"),
    "rtx": ("gpu", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
}


def pick(implementation: str | None, gpu_limit: str | None = None):
    return choose(
        "an_operation",
        implementation,
        reference=reference,
        tpu=Kernel(on_tpu),
        gpu=Kernel(on_gpu, lambda: gpu_limit),
        cpu=on_cpu,
    )


@pytest.mark.parametrize(
    ("device", "expected"),
    [("v5e", on_tpu), ("h100", on_gpu), ("gh200", on_gpu), ("b200", on_gpu)]
    + [(device, reference) for device in ("a100", "mi300x", "rtx")],
)
def test_platforms_own(device: str, expected) -> None:
    with compiled_for(*DEVICES[device]):
        assert pick(None) is expected
        assert pick("reference") is reference


@pytest.mark.parametrize("device", ["a100", "mi300x", "rtx"])
def test_a_gpu_without_kernels_says_so_in_one_line(device: str) -> None:
    platform, kind = DEVICES[device]
    with compiled_for(platform, kind), pytest.raises(ImplementationError) as error:
        pick("pallas")
    assert str(error.value) == f"an_operation: no Pallas kernel for {kind}; expected None or 'reference'"


def test_the_operations_themselves_refuse_an_a100() -> None:
    weight = jnp.zeros((2, 128, 128), jnp.bfloat16)
    x, sizes = jnp.zeros((4, 128), jnp.bfloat16), jnp.array([2, 2])
    with compiled_for(*DEVICES["a100"]), pytest.raises(ImplementationError, match="NVIDIA A100"):
        grouped_swiglu(x, weight, weight, sizes, implementation="pallas")


def test_arguments_that_a_kernel_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    with compiled_for(*DEVICES["h100"]), caplog.at_level(logging.INFO, "pallas_kernels.implementation"):
        assert pick(None, "odd arguments") is reference
        with pytest.raises(ImplementationError, match="the Pallas kernel does not take odd arguments"):
            pick("pallas", "odd arguments")
    assert "the Pallas kernel does not take odd arguments" in caplog.text


def test_where_xla_does_as_well_it_stands_for_the_kernel() -> None:
    with compiled_for(*DEVICES["h100"]):
        for name in (None, "pallas"):
            assert choose("another", name, reference=reference, tpu=Kernel(on_tpu)) is reference


def test_on_a_cpu() -> None:
    assert pick(None) is on_cpu
    assert pick("pallas") is on_tpu
    with pytest.raises(ImplementationError, match="expected None or one of 'reference', 'pallas', 'cpu'"):
        pick("triton")


@pytest.mark.parametrize(
    ("device", "generation", "sms"), [("h100", "hopper", 132), ("b200", "blackwell", 148)]
)
def test_chips(device: str, generation: str, sms: int) -> None:
    with compiled_for(*DEVICES[device]):
        chip = gpu_chip()
    assert chip is not None
    assert (chip.generation, chip.sms) == (generation, sms)


def test_target_is_the_default_device_without_a_mesh() -> None:
    assert target() == (jax.default_backend(), jax.devices()[0].device_kind)

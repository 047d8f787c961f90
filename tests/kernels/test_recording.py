"""Recorded launches: what Triton's launcher is given the second time, with other addresses. Nothing is launched."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from dma_diffusers.kernels.device.recording import Recorder, Recording, _Launch  # noqa: E402

SIGNATURE = ("*fp32", "tensordesc<fp32[1, 4]>", "i32", "*fp32", "*fp32", "constexpr", "constexpr")


class Launcher:
    """Triton's launcher, which ends in `launched` rather than in the GPU; `flat` as Triton 3.6 has it."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launched, has_descriptors: bool, flat: bool):
        self.flat = flat
        signature = dict(enumerate(kind for kind in SIGNATURE if has_descriptors or "desc" not in kind))
        self.launch = flat_wrapper(launched) if flat else nested_wrapper(launched, signature)

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        head = (x, y, z, stream, function, False, False)
        if self.flat:
            self.launch(*head, None, None, metadata, launch_metadata, enter, leave, *arguments)
        else:
            self.launch(*head, metadata, launch_metadata, enter, leave, None, None, (), b"", arguments)


def flat_wrapper(launcher):
    """Triton 3.6 expands descriptors among all arguments."""

    def inner(*arguments):
        expanded = []
        for argument in arguments:
            is_descriptor = isinstance(argument, TensorDescriptor)
            expanded += [argument.base, *argument.shape, *argument.strides] if is_descriptor else [argument]
        return launcher(*expanded)

    return inner


def nested_wrapper(launcher, signature):
    """Later Tritons expand them among the kernel's arguments alone: Triton's own wrapper where it can be had."""
    driver = pytest.importorskip("triton.backends.driver")
    if not hasattr(driver, "wrap_handle_tensordesc_impl"):
        pytest.skip("Triton before 3.8")
    return driver.wrap_handle_tensordesc_impl(
        launcher,
        signature,
        [{}] * (len(signature) == len(SIGNATURE)),
        lambda x, *_: [x.base, *x.shape, *x.strides],
    )


def addresses_of(arguments) -> list:
    """Arguments with addresses in the place of descriptors, but for what stands before the kernel's own."""
    own = arguments[-1] if type(arguments[-1]) in (list, tuple) else arguments[13:]
    return [x.data_ptr() if hasattr(x, "data_ptr") else x for x in own]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("has_descriptors", [False, True])
def test_launches_again_with_other_addresses(flat, has_descriptors):
    launched = []
    launcher = Launcher(lambda *arguments: launched.append(arguments), has_descriptors, flat)
    compiled = SimpleNamespace(run=launcher, function=77, packed_metadata=(4, 1, 0))
    first, others = torch.zeros(4, 4), [torch.zeros(4, 4) for _ in range(3)]
    constant = torch.zeros(4)
    descriptors = [TensorDescriptor.from_tensor(first, [1, 4])] if has_descriptors else []
    recorder = Recorder((first,))
    workspace = recorder.empty((4,), torch.float32, first.device)
    recorder.launches.append(
        (compiled, (3, 1, 1), [first, *descriptors, 9, workspace, constant, None, "e4m3"])
    )
    recording = Recording(recorder, [constant])
    assert recording.bytes == 256
    for stream, x in enumerate((*others, others[0])):
        recording._launches[0](stream, (x.data_ptr(), 4096, 8192))
        assert launched[-1][:5] == (3, 1, 1, stream, 77)
        own = addresses_of(launched[-1])
        assert own[0] == x.data_ptr() and own[-4:] == [4096, constant.data_ptr(), None, "e4m3"]
        if has_descriptors:
            assert own[1] == x.data_ptr() and own[2:6] == [4, 4, 4, 1]


def test_tensors_that_nobody_named_are_refused():
    x, stranger = torch.zeros(4), torch.zeros(4)
    recorder = Recorder((x,))
    recorder.launches.append((SimpleNamespace(), (1, 1, 1), [x, stranger]))
    with pytest.raises(ValueError, match=r"reads a tensor \[4\] that was not recorded"):
        Recording(recorder, [])
    with pytest.raises(ValueError, match="two tensors of the call begin at one address"):
        Recording(Recorder((x, x.view(2, 2))), [])


def test_no_tensor_of_the_recorded_call_is_kept():
    """A CUDA graph that is warmed up by that call owns their memory."""
    x = torch.zeros(4, 4)
    recorder = Recorder((x,))
    workspace = recorder.empty((4, 4), torch.float32, x.device)
    descriptors = [TensorDescriptor.from_tensor(y, [1, 4]) for y in (x, workspace)]
    compiled = SimpleNamespace(run=lambda *given: None, function=1, packed_metadata=None)
    recorder.launches.append((compiled, (1, 1, 1), [x, workspace, *descriptors]))
    recording = Recording(recorder, [])
    there = [weakref.ref(y) for y in (x, workspace)]
    del x, workspace, recorder, descriptors
    gc.collect()
    assert recording.bytes == 256 and [found() for found in there] == [None, None]


def test_a_launcher_of_another_kind_is_called_as_it_is():
    called = []
    compiled = SimpleNamespace(run=lambda *given: called.append(given), function=1, packed_metadata=None)
    x, y = torch.zeros(4, 4), torch.zeros(4, 4)
    recorder = Recorder((x,))
    recorder.launches.append((compiled, (1, 1, 1), [x, TensorDescriptor.from_tensor(x, [1, 4])]))
    launch = Recording(recorder, [])._launches[0]
    assert isinstance(launch, _Launch)
    launch(5, (y.data_ptr(), 0, 0))
    (given,) = called
    assert given[:5] == (1, 1, 1, 5, 1) and given[9] == y.data_ptr()
    assert given[10].base.data_ptr() == y.data_ptr() and given[10].block_shape == [1, 4]

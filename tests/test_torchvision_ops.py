import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aim_surgery.checkpoint.models.torchvision_ops import SCHEMAS, import_torchvision, nms
from aim_surgery.errors import ModelSpecError

torchvision = import_torchvision()
HAS_EXTENSION = torchvision.extension._has_ops()
ROOT = Path(__file__).parents[1]
MISSING = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
CATCH = """
import sys
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.errors import ModelSpecError
try:
    import_torchvision()
except ModelSpecError as err:
    print(err)
print([name for name in sys.modules if name.split(".")[0] == "torchvision"])
"""


def in_fresh_process(code: str, *, fake_torchvision: Path | None = None) -> list[str]:
    """The lines that `code` prints; a fake torchvision is found before the installed one."""
    path = [str(fake_torchvision)] if fake_torchvision else []
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fake_package(folder: Path, init: str) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "extension.py").write_text("")
    (package / "__init__.py").write_text("from torchvision import extension\n" + init)
    return folder


def reference_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> list[int]:
    """All pairs, in Python floats."""

    def iou(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        union = areas - width * height
        return width * height / union if union else 0.0

    boxes, kept = dets.tolist(), []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i].item()):
        if all(iou(boxes[index], boxes[other]) <= iou_threshold for other in kept):
            kept.append(index)
    return kept


def random_boxes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + size], dim=1), scores


# --- the import ---------------------------------------------------------------------------------


def test_the_second_call_returns_the_same_module_and_declares_nothing():
    from aim_surgery.checkpoint.models import torchvision_ops

    before = list(torchvision_ops._libraries)
    assert import_torchvision() is torchvision is sys.modules["torchvision"]
    assert torchvision_ops._libraries == before
    assert len(before) == (0 if HAS_EXTENSION else 1)


def test_it_works_after_a_plain_import_has_failed():
    printed = in_fresh_process("""
try:
    import torchvision
    print("loads")
except RuntimeError as err:
    print(err)
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
first = import_torchvision()
import torchvision
print(torchvision is first, torchvision.ops.nms is not None)
""")
    assert printed[0] == ("loads" if HAS_EXTENSION else "operator torchvision::nms does not exist")
    assert printed[1] == "True True"


def test_a_torchvision_that_loads_is_left_alone(tmp_path):
    fake = fake_package(tmp_path, "")
    printed = in_fresh_process(
        "import torch\n"
        "from aim_surgery.checkpoint.models.torchvision_ops import SCHEMAS, import_torchvision\n"
        "print(import_torchvision().__file__)\n"
        "print([name for name in SCHEMAS if hasattr(torch.ops.torchvision, name)])",
        fake_torchvision=fake,
    )
    assert printed == [str(fake / "torchvision" / "__init__.py"), "[]"]


def test_an_operator_that_exists_keeps_its_schema(tmp_path):
    fake = fake_package(
        tmp_path,
        "import torch\n"
        "if hasattr(torch.ops.torchvision, 'nms'):\n"
        "    print(torch.ops.torchvision.nms.default._schema)\n"
        "    print(torch.ops.torchvision.roi_pool.default._schema)\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "torch.kept = library\n"
        "library.define('nms(Tensor mine) -> Tensor')\n" + MISSING,
    )
    printed = in_fresh_process(CATCH, fake_torchvision=fake)
    assert printed[0] == "torchvision::nms(Tensor mine) -> Tensor"
    assert printed[1] == f"torchvision::roi_pool{SCHEMAS['roi_pool']}"


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (MISSING, "RuntimeError: operator torchvision::nms does not exist"),
        ("import no_such_dependency\n", "No module named 'no_such_dependency'"),
        ("raise RuntimeError('CUDA versions differ')\n", "RuntimeError: CUDA versions differ"),
    ],
)
def test_a_broken_torchvision_is_reported_and_leaves_no_half(tmp_path, init, reason):
    printed = in_fresh_process(CATCH, fake_torchvision=fake_package(tmp_path, init))
    assert reason in printed[0]
    assert "install the build that matches PyTorch" in printed[0]
    assert printed[1] == "[]"


def test_a_missing_torchvision_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModelSpecError, match="pip install torchvision"):
        import_torchvision()
    assert sys.modules["torchvision"] is None


# --- the schemas --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_operator_has_the_declared_schema(name):
    schema = getattr(torch.ops.torchvision, name).default._schema
    assert str(schema) == f"torchvision::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "box_iou_rotated"])
def test_the_schema_fits_the_meta_function_of_torchvision(name):
    registrations = importlib.import_module("torchvision._meta_registrations")
    meta_name = f"meta_{name.lstrip('_')}"
    arguments = inspect.signature(getattr(registrations, meta_name)).parameters
    declared = torch._C.parse_schema(f"torchvision::{name}{SCHEMAS[name]}").arguments
    abbreviated = {"dil_h": "dilation_h", "dil_w": "dilation_w"} | {
        "n_weight_grps": "groups",
        "n_offset_grps": "offset_groups",
    }
    assert [abbreviated.get(arg, arg) for arg in arguments] == [arg.name for arg in declared]


@pytest.mark.skipif(HAS_EXTENSION, reason="every operator has its kernel")
def test_an_operator_without_a_kernel_says_so():
    with pytest.raises(RuntimeError, match="custom C\\+\\+ ops"):
        torchvision.ops.roi_pool(torch.rand(1, 1, 4, 4), torch.rand(1, 5), 2)
    with pytest.raises(NotImplementedError, match="torchvision::box_iou_rotated"):
        torchvision.ops.box_iou(torch.rand(1, 5), torch.rand(1, 5), fmt="cxcywhr")


# --- nms and roi_align --------------------------------------------------------------------------


@pytest.mark.parametrize("iou_threshold", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 1), (30, 2), (30, 3), (200, 4)])
def test_nms_keeps_what_the_reference_keeps(count, seed, iou_threshold):
    boxes, scores = random_boxes(count, seed)
    kept = nms(boxes, scores, iou_threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == reference_nms(boxes, scores, iou_threshold)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, iou_threshold))


def test_nms_compares_strictly():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]])  # iou exactly 1/2
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.499).tolist() == [0]


def test_nms_leaves_equal_scores_in_their_order():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [0, 0, 1, 1], [8, 8, 9, 9]])
    assert nms(boxes, torch.ones(4), 0.5).tolist() == [0, 1, 3]
    assert nms(boxes, torch.tensor([1.0, 2, 1, 2]), 0.5).tolist() == [1, 3, 0]
    many, scores = random_boxes(300, 5)
    ties = scores.mul(4).round()
    assert nms(many, ties, 0.2).tolist() == reference_nms(many, ties, 0.2)


def test_nms_of_nothing_and_of_boxes_without_area():
    kept = nms(torch.empty(0, 4), torch.empty(0), 0.5)
    assert (kept.dtype, kept.shape) == (torch.int64, (0,))
    assert nms(torch.ones(3, 4), torch.tensor([1.0, 3.0, 2.0]), 0.5).tolist() == [1, 2, 0]


def test_nms_takes_no_part_in_autograd():
    boxes, scores = (tensor.requires_grad_() for tensor in random_boxes(10, 0))
    assert not torchvision.ops.nms(boxes, scores, 0.5).requires_grad


def test_batched_nms_suppresses_inside_a_class_only():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3)
    kept = torchvision.ops.batched_nms(
        boxes, torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0, 1, 1]), 0.5
    )
    assert kept.tolist() == [1, 0]


def test_roi_align_of_a_ramp_is_the_ramp_at_the_bin_centres():
    column = torch.arange(16.0).expand(1, 1, 16, 16)
    roi = torch.tensor([[0.0, 2.0, 2.0, 10.0, 10.0]])
    pooled = torchvision.ops.roi_align(column, roi, 4, sampling_ratio=2, aligned=True)
    assert pooled.shape == (1, 1, 4, 4)
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([2.5, 4.5, 6.5, 8.5]))


def test_roi_align_of_many_boxes_is_that_of_each_and_reaches_the_features():
    features = torch.rand(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    boxes, _ = random_boxes(150, 0)
    rois = torch.cat([torch.arange(150.0).remainder(2)[:, None], boxes * 6], dim=1)
    pooled = torchvision.ops.roi_align(features, rois, 3, sampling_ratio=2)
    each = [torchvision.ops.roi_align(features, roi[None], 3, sampling_ratio=2) for roi in rois]
    torch.testing.assert_close(pooled, torch.cat(each), rtol=1e-12, atol=1e-12)
    pooled.sum().backward()
    assert features.grad is not None
    assert features.grad.sum().item() == pytest.approx(pooled.numel())
    assert torchvision.ops.roi_align(features, rois[:0], 3).shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ssdlite320_mobilenet_v3_large", {"score_thresh": 0.0, "nms_thresh": 0.3}),
        (
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            {"box_score_thresh": 0.0, "box_nms_thresh": 0.3, "num_classes": 3},
        ),
    ],
)
def test_a_detection_model_runs(name, settings):
    torch.manual_seed(0)
    builder = torchvision.models.get_model_builder(name)
    model = builder(weights=None, weights_backbone=None, **settings).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 120, 160)])
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 0
    for label in found["labels"].unique():
        boxes = found["boxes"][found["labels"] == label]
        overlap = torchvision.ops.box_iou(boxes, boxes).nan_to_num().fill_diagonal_(0)
        assert overlap.max() <= 0.3 + 1e-5

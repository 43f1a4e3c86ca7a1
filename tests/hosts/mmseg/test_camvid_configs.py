"""The configs for CamVid: on a folder that tools/prepare_camvid.py wrote, with rates for a pretrained backbone."""

from pathlib import Path

import pytest

from support.tiny_ade import ROOT, one_thread  # noqa: F401
from support.tiny_camvid import write_camvid

pytest.importorskip("mmseg", reason="the MMSeg configs need the packages of the extra 'mmseg'")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmseg.registry import DATASETS

from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.weights.parameter_rules import decays

from evidence.camvid_in_ade20k_layout import CLASSES, prepare_camvid

CONFIGS = sorted((ROOT / "configs" / "mmseg").glob("*_camvid-*.py"))
TINY = {
    "model.backbone.embed_dim": 32,
    "model.backbone.depth": 2,
    "model.backbone.num_heads": 2,
    "model.backbone.out_indices": (1,),
    "model.decode_head.in_channels": 32,
    "model.decode_head.channels": 32,
}
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_camvid(write_camvid(folder / "theirs"), folder / "camvid")
    return folder / "camvid"


@every_config
def test_model_trains_on_what_the_data_set_gives(path: Path, camvid: Path) -> None:
    cfg = load_config(str(path), TINY, data_root=str(camvid))
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    assert tuple(data.metainfo["classes"]) == CLASSES
    sample = data[0]
    assert tuple(sample["inputs"].shape) == (3, 364, 476)
    batch = model.data_preprocessor({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}, True)
    model(**batch, mode="loss")["decode.loss_ce"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_config
@pytest.mark.parametrize("split", ["val", "test"])
def test_labels_of_other_splits_are_whole(path: Path, split: str, camvid: Path) -> None:
    cfg = load_config(str(path), data_root=str(camvid))
    init_default_scope("mmseg")
    sample = DATASETS.build(cfg[f"{split}_dataloader"].dataset)[0]
    assert tuple(sample["inputs"].shape[1:]) == (364, 476)
    assert set(sample["data_samples"].gt_sem_seg.data.unique().tolist()) == {*range(11), 255}
    assert sample["data_samples"].gt_sem_seg.data.shape[1:] == (36, 48)


@every_config
def test_the_backbone_learns_at_a_fiftieth_of_the_heads_rate(path: Path) -> None:
    cfg = load_config(str(path), TINY)
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate, decay = rates[id(parameter)]
        assert rate == pytest.approx(1e-3 if name.startswith("decode_head.") else 2e-5), name
        assert decay == (0.05 if decays(name, parameter) or name == "decode_head.conv_seg.bias" else 0), name


def test_the_uniform_twin_differs_in_thresholds_only() -> None:
    adaptive, uniform = (Config.fromfile(path).to_dict() for path in CONFIGS)
    assert adaptive["model"]["backbone"].pop("thresholds") == (5.5,)
    assert uniform["model"]["backbone"].pop("thresholds") == ()
    assert adaptive == uniform


@every_config
def test_what_runs_keep_of_the_config_is_the_same(path: Path) -> None:
    cfg = Config.fromfile(path)
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()

"""tools/train_seg.py and tools/eval_seg.py on the shrunken real config and a tiny folder in ADE20K's layout."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.families import HEADS, WIDTH, timm_model
from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade, write_mask  # noqa: F401

pytest.importorskip("mmseg", reason="the segmentation tools need the packages of the extra 'mmseg'")

import eval_seg
import train_seg
from mmengine.runner import Runner

from apt_dense.hosts.mmseg import mask_pixels_per_class
from apt_dense.hosts.mmseg.safe_checkpoints import read_run
from apt_dense.hosts.mmseg.training_config import load_config

SIZE = (128, 192)


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade(tmp_path_factory.mktemp("data") / "ade", size=SIZE)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """upernet_apt_vit-b16_160k_ade20k-512x512.py with everything small, as a separate file."""
    real = next(path for path in CONFIGS if path.name.startswith("upernet_apt_vit-b16"))
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    cfg = load_config(str(real), shrink_options(real))
    cfg.tta_pipeline[1].transforms[0] = cfg.tta_pipeline[1].transforms[0][:2]  # two of the six scales
    cfg.dump(path)
    return str(path)


@pytest.fixture(scope="module")
def trained(config: str, ade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work dir after 4 iterations with checkpoints at 2 and 4."""
    work_dir = tmp_path_factory.mktemp("work")
    train(config, ade, work_dir, "--cfg-options", "default_hooks.checkpoint.interval=2", "randomness.seed=0")
    return work_dir


def train(config: str, ade: Path, work_dir: Path, *extra: str, max_iters: int = 4) -> None:
    common = [config, "--data-root", str(ade), "--max-iters", str(max_iters), "--work-dir", str(work_dir)]
    train_seg.main([*common, *extra])


def failure(main: object, argv: list[str]) -> str:
    """The one line that a tool ends with."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    message = str(ended.value.code)
    assert "\n" not in message
    return message


def logged(work_dir: Path, kind: str = "loss") -> list[dict]:
    """The lines of the newest JSON log that have an entry: "loss" in training, "mIoU" after validation."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime_ns)
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return [line for line in lines if kind in line]


def test_training_saves_validates_and_logs(trained: Path) -> None:
    assert {path.name for path in trained.glob("*.pth")} == {"iter_2.pth", "iter_4.pth", "best_mIoU_iter_4.pth"}
    assert (trained / "last_checkpoint").read_text() == str(trained / "iter_4.pth")
    lines = logged(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    validations = logged(trained, "mIoU")
    assert validations and all(np.isfinite(line["loss"]) for line in lines)
    assert all(0 < line["tokens_kept"] <= 1 for line in [*lines, *validations])


def test_resume_continues_from_the_last_checkpoint(trained: Path, config: str, ade: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "resumed"
    work_dir.mkdir()
    shutil.copy(trained / "iter_2.pth", work_dir)
    (work_dir / "last_checkpoint").write_text(str(work_dir / "iter_2.pth"))
    train(config, ade, work_dir, "--resume", "--cfg-options", "train_cfg.val_interval=2")
    assert [line["step"] for line in logged(work_dir, "mIoU")] == [2, 4], "an evaluation was due when it was stopped"
    before, after = logged(trained), logged(work_dir)
    assert [line["step"] for line in after] == [3, 4]
    assert [line["lr"] for line in after] == [line["lr"] for line in before[2:]]
    assert read_run(str(work_dir / "iter_4.pth"))["meta"]["seed"] == 0


def test_resume_from_a_cut_off_checkpoint_names_it(trained: Path, config: str, ade: Path, tmp_path: Path) -> None:
    (tmp_path / "iter_2.pth").write_bytes((trained / "iter_2.pth").read_bytes()[:100_000])
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    argv = [config, "--data-root", str(ade), "--work-dir", str(tmp_path), "--resume", "--max-iters", "4"]
    message = failure(train_seg.main, argv)
    assert "iter_2.pth (100000 bytes) cannot be read" in message and "last_checkpoint" in message


def test_resume_for_longer_is_refused(trained: Path, config: str, ade: Path) -> None:
    argv = [config, "--data-root", str(ade), "--work-dir", str(trained), "--resume", "--max-iters", "8"]
    assert "schedule of 4 iterations, but 8 are asked for" in failure(train_seg.main, argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for mixed precision on a CPU")
def test_amp_trains_in_bfloat16(config: str, ade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = set(), torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        output = plain(self, x)
        seen.add((self.training, output.dtype))
        return output

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    train(config, ade, tmp_path, "--amp", max_iters=1)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}, "MMEngine validates in full precision"
    state = read_run(str(tmp_path / "iter_1.pth"))["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_label_out_of_range_stops_training_with_its_file(config: str, ade: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(ade, tmp_path / "bad")
    paths = [write_mask(bad, np.full(SIZE, 200, np.uint8), name=f"{i}.png") for i in range(2)]
    message = failure(train_seg.main, [config, "--data-root", str(bad), "--work-dir", str(tmp_path / "work")])
    assert message.startswith(f"train_seg: {paths[0]}: label 199 after reduce_zero_label")


@pytest.mark.parametrize("tool", [train_seg, eval_seg], ids=["train", "test"])
def test_missing_data_root_is_named_before_a_model_is_built(
    tool: object, config: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "from_cfg", lambda cfg: pytest.fail("the Runner was built"))
    checkpoint = [str(trained / "iter_4.pth")] if tool is eval_seg else []
    message = failure(tool.main, [config, *checkpoint, "--data-root", str(tmp_path / "nowhere")])
    assert f"the folder {tmp_path}/nowhere/images/" in message and "--data-root DIR" in message


def test_missing_config_and_checkpoint_are_named(config: str, ade: Path, tmp_path: Path) -> None:
    assert failure(train_seg.main, ["nowhere.py"]) == "train_seg: no config file nowhere.py"
    argv = [config, "nowhere.pth", "--data-root", str(ade), "--work-dir", str(tmp_path)]
    assert "nowhere.pth does not exist" in failure(eval_seg.main, argv)


def test_testing_gives_metrics_masks_and_paintings(trained: Path, config: str, ade: Path, tmp_path: Path) -> None:
    masks, paintings = tmp_path / "masks", tmp_path / "paintings"
    argv = [config, str(trained / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path / "work"),
            "--out", str(masks), "--show-dir", str(paintings)]  # fmt: skip
    metrics = eval_seg.main(argv)
    assert set(metrics) == {"aAcc", "mIoU", "mAcc"} and 0 <= metrics["mIoU"] <= 100
    (log,) = (tmp_path / "work").glob("*/*.json")
    assert 0 < json.loads(log.read_text())["tokens_kept"] < 1
    predicted = np.asarray(Image.open(masks / "0.png"))
    assert predicted.shape == SIZE and 1 <= predicted.min() <= predicted.max() <= 150, "labels are written as in ADE20K"
    assert len(list(paintings.rglob("*.png"))) == 2


def test_testing_with_augmentation(trained: Path, config: str, ade: Path, tmp_path: Path) -> None:
    argv = [config, str(trained / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path), "--tta"]
    assert set(eval_seg.main(argv)) == {"aAcc", "mIoU", "mAcc"}


BY_SCALE = {"mIoU_fine", "mIoU_coarse", "mBoundaryIoU", "mBoundaryIoU_fine", "mBoundaryIoU_coarse", "coarse_pixels"}


@pytest.mark.parametrize("tta", [(), ("--tta",)])
def test_pixels_are_scored_by_scale(
    tta: tuple[str, ...], trained: Path, config: str, ade: Path, tmp_path: Path
) -> None:
    """With sliding windows; and the plain ViT by the same patches."""
    argv = [config, str(trained / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path), *tta]
    adaptive = eval_seg.main([*argv, "--by-scale"])
    assert {*BY_SCALE, "mIoU"} <= set(adaptive) and 20 < adaptive["coarse_pixels"] < 80
    thresholds = map(str, load_config(config).model.backbone.thresholds)
    plain = ["--cfg-options", "model.backbone.thresholds=()"]
    uniform = eval_seg.main([*argv, "--by-scale", *thresholds, *plain])
    assert uniform["coarse_pixels"] == adaptive["coarse_pixels"] and set(uniform) >= BY_SCALE
    alone = eval_seg.main([*argv, "--by-scale", *plain])
    assert alone["coarse_pixels"] == 0 and "mIoU_coarse" not in alone
    assert alone["mIoU_fine"] == pytest.approx(alone["mIoU"], abs=0.011)


def test_validations_of_a_training_score_by_scale(config: str, ade: Path, tmp_path: Path) -> None:
    cfg = load_config(config)
    cfg.val_evaluator = [cfg.val_evaluator, dict(type="ScaleIoUMetric")]
    cfg.dump(tmp_path / "both.py")
    train(str(tmp_path / "both.py"), ade, tmp_path / "work", max_iters=1)
    (line,) = logged(tmp_path / "work", "mIoU")
    assert set(line) >= BY_SCALE


def test_packed_augmentation_predicts_what_mmsegs_own_does(
    trained: Path, config: str, ade: Path, tmp_path: Path
) -> None:
    argv = [config, str(trained / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path), "--tta", "--out"]
    eval_seg.main([*argv, str(tmp_path / "packed")])
    own = ["--cfg-options", "model.type=EncoderDecoder", "tta_model.type=SegTTAModel"]
    eval_seg.main([*argv, str(tmp_path / "own"), *own])
    for name in ("0.png", "1.png"):
        packed, expected = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("packed", "own"))
        assert len(np.unique(packed)) > 1
        assert np.mean(packed == expected) > 0.999, "rounding may decide between two equal logits"


def test_checkpoint_of_another_model_is_refused(trained: Path, config: str, ade: Path, tmp_path: Path) -> None:
    argv = [config, str(trained / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path),
            "--cfg-options", "model.decode_head.channels=16"]  # fmt: skip
    assert "iter_4.pth does not fit this config's model" in failure(eval_seg.main, argv)


def test_checkpoint_with_thresholds_may_be_tested_without(
    trained: Path, config: str, ade: Path, tmp_path: Path
) -> None:
    argv = [config, str(trained / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path),
            "--cfg-options", "model.backbone.thresholds=()"]  # fmt: skip
    assert "mIoU" in eval_seg.main(argv)


# ---- data and configs that hosts allow


def binary_config(root: Path, path: Path, **parts: object) -> str:
    """The least that MMEngine needs to train two classes on images/ and masks/ below a folder."""
    loader = dict(
        batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
        dataset=dict(
            type="BaseSegDataset", data_root=str(root), metainfo=dict(classes=("background", "thing")),
            img_suffix=".png", data_prefix=dict(img_path="images", seg_map_path="masks"),
            pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
        ),
    )  # fmt: skip
    config = dict(
        default_scope="mmseg",
        custom_imports=dict(imports=["apt_dense.hosts.mmseg"]),
        model=dict(
            type="APTEncoderDecoder", test_cfg=dict(mode="whole"),
            data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64)),
            backbone=dict(type="APTViT", img_size=64, embed_dim=32, depth=1, num_heads=2),
            decode_head=dict(
                type="FCNHead", in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=2,
                loss_decode=dict(type="CrossEntropyLoss"),
            ),
        ),
        train_dataloader=loader, test_dataloader=loader, test_evaluator=[dict(type="IoUMetric")],
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=2),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
    ) | parts  # fmt: skip
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in config.items()))
    return str(path)


def write_binary(root: Path, *names: str, value: int = 1) -> Path:
    """Pictures of 64 x 64 pixels, and masks with a square of ``value``."""
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 10:40] = value
    for name in names:
        for kind, pixels in (("images", np.stack([mask * 100] * 3, axis=2)), ("masks", mask)):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / kind / name)
    return root


@pytest.mark.parametrize("amp", [(), ("--amp",)])
def test_the_least_config_trains_and_is_tested(amp: tuple[str, ...], tmp_path: Path) -> None:
    """Without types, hooks, visualizer, validation or tta_model; with a list of evaluators and images of one name."""
    root = write_binary(tmp_path / "data", "a/0.png", "b/0.png")
    augment = dict(type="TestTimeAug", transforms=[
        [dict(type="RandomFlip", prob=prob) for prob in (0.0, 1.0)], [dict(type="LoadAnnotations")],
        [dict(type="PackSegInputs")],
    ])  # fmt: skip
    config = binary_config(root, tmp_path / "own.py", tta_pipeline=[dict(type="LoadImageFromFile"), augment])
    train_seg.main([config, "--work-dir", str(tmp_path / "work"), *amp])
    (saved,) = (tmp_path / "work").glob("*.pth")
    for tta in ((), ("--tta",), ("--tta", "--cfg-options", "tta_pipeline=None")):
        metrics = eval_seg.main([
            config, str(saved), "--work-dir", str(tmp_path / "test"), "--out", str(tmp_path / "masks"),
            "--show-dir", str(tmp_path / "drawn"), *tta,
        ])  # fmt: skip
        assert 0 <= metrics["mIoU"] <= 100
    written = sorted(str(path.relative_to(tmp_path / "masks")) for path in (tmp_path / "masks").rglob("*.png"))
    assert written == ["a/0.png", "b/0.png"]
    assert len(list((tmp_path / "drawn").rglob("*.png"))) >= 2


def test_a_weights_file_describes_the_backbone(tmp_path: Path) -> None:
    """In training, and in tests also once that file is gone."""
    root, weights = write_binary(tmp_path / "data", "0.png"), tmp_path / "dinov2.pth"
    torch.save(dict(timm_model("dinov2").state_dict()), weights)
    head = dict(
        type="FCNHead", in_channels=WIDTH, channels=WIDTH, num_convs=0, concat_input=False, num_classes=2,
        loss_decode=dict(type="CrossEntropyLoss"),
    )  # fmt: skip
    model = dict(
        type="EncoderDecoder", test_cfg=dict(mode="whole"), decode_head=head,
        data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64)),
        backbone=dict(type="APTViT", pretrained=str(weights), img_size=64, patch_size=16, thresholds=(5.0,)),
    )  # fmt: skip
    config = binary_config(root, tmp_path / "own.py", model=model, test_cfg=dict(type="TestLoop"))
    work = tmp_path / "work"
    assert "do not tell num_heads. Add num_heads" in failure(train_seg.main, [config, "--work-dir", str(work)])
    answer = ["--cfg-options", f"model.backbone.num_heads={HEADS}"]
    train_seg.main([config, "--work-dir", str(work), *answer])
    (saved,) = work.glob("*.pth")
    scores = [eval_seg.main([config, str(saved), "--work-dir", str(tmp_path / "test"), *answer])]
    weights.unlink()
    for argv in ([config, str(saved), *answer], [str(work / "own.py"), str(saved)]):
        scores.append(eval_seg.main([argv[0], argv[1], "--work-dir", str(tmp_path / "test"), *argv[2:]]))
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(("value", "message"), [(255, "255 is ignored"), (0, "single label"), (7, "label 7")])
def test_nothing_to_learn_is_refused(value: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "from_cfg", lambda cfg: pytest.fail("the Runner was built"))
    root = write_binary(tmp_path / "data", "0.png", "1.png", value=value)
    config = binary_config(root, tmp_path / "own.py")
    assert message in failure(train_seg.main, [config, "--work-dir", str(tmp_path / "work")])
    (tmp_path / "any.pth").touch()
    argv = [config, str(tmp_path / "any.pth"), "--work-dir", str(tmp_path / "work")]
    assert message in failure(eval_seg.main, argv)


@pytest.mark.parametrize(
    ("parts", "flags", "message"),
    [
        (dict(test_dataloader=None), (), "no test_dataloader"),
        (dict(test_evaluator=None), (), "no test_evaluator"),
        (dict(model=None), (), "no model"),
        (dict(test_evaluator=[dict(type="DepthMetric")]), ("--out", "masks"), "--out needs an evaluator"),
    ],
)
def test_configs_that_cannot_be_tested(parts: dict, flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    config = binary_config(write_binary(tmp_path / "data", "0.png"), tmp_path / "own.py", **parts)
    assert message in failure(eval_seg.main, [config, "any.pth", "--work-dir", str(tmp_path), *flags])


@pytest.mark.parametrize("tool", [train_seg, eval_seg], ids=["train", "test"])
@pytest.mark.parametrize(
    ("option", "key"),
    [("model.decode_head.type=Nope", "model.decode_head in"), ("model.backbone.depth=0", "model.backbone in"),
     ("test_dataloader.dataset.pipeline.1.foo=1", "test_dataloader.dataset.pipeline[1] in"), ("work_dir=3", "")],
)  # fmt: skip
def test_mistakes_in_configs_are_named(tool: object, option: str, key: str, tmp_path: Path) -> None:
    config = binary_config(write_binary(tmp_path / "data", "0.png"), tmp_path / "own.py")
    torch.save({}, tmp_path / "any.pth")
    argv = [config] if tool is train_seg else [config, str(tmp_path / "any.pth")]
    option = option.replace("test_", "train_") if tool is train_seg else option
    key = key.replace("test_", "train_") if tool is train_seg else key
    argv += ["--work-dir", str(tmp_path / "work"), "--cfg-options", option]
    assert failure(tool.main, argv).partition(": ")[2].startswith(key or "the config's work_dir=3 must be")


HEAD = "model.decode_head in the config"
AUXILIARY = [f"model.auxiliary_head.{option}" for option in (
    "type=FCNHead", "in_channels=8", "channels=8", "num_classes=2", "loss_decode.type=CrossEntropyLoss",
)]  # fmt: skip
FPN = ["model.neck.type=FPN", "model.neck.out_channels=32"]
#: Mistakes that show in the first batch or forward pass, by whom they stop, and what is named.
LATE = [
    ("train", ["model.decode_head.in_channels=16", "model.decode_head.channels=16"], f"{HEAD} (the model's"),
    ("train", AUXILIARY, "model.auxiliary_head in"),
    ("train", [*FPN, "model.neck.in_channels=[32,32]", "model.neck.num_outs=2"], "model.neck in"),
    ("train", [*FPN, "model.neck.in_channels=[16]", "model.neck.num_outs=1"], "model.neck in"),
    ("train", ["model.decode_head.in_index=3"], HEAD),
    ("test", ["model.decode_head.in_index=3"], HEAD),
    ("train", ["model.data_preprocessor=None"], "model.backbone in"),
    ("test", ["model.data_preprocessor=None"], "model in"),
    ("train", ["model.decode_head.loss_decode.class_weight=[1.0]"], "model.decode_head.loss_decode in"),
    ("train", ["model.decode_head.out_channels=1"], "model.decode_head.loss_decode in"),
    ("train", ["model.data_preprocessor.size=None", "train_dataloader.batch_size=2"], "model.data_preprocessor in"),
    ("train", ["train_dataloader.dataset.pipeline.2.type=RandomCrop",
               "train_dataloader.dataset.pipeline.2.crop_size=(0.5,0.5)", "train_dataloader.num_workers=1"],
     "RandomCrop of train_dataloader.dataset.pipeline in"),
    ("train", ["optim_wrapper.clip_grad.max_nrom=1"], "optim_wrapper in"),
    ("test", ["model.test_cfg.mode=slide"], "model in"),
    ("test", ["test_dataloader.dataset.pipeline.2.meta_keys=('nope',)", "test_dataloader.num_workers=1"], "model in"),
    ("test", ["test_evaluator.0.nan_to_num=x"], "IoUMetric of test_evaluator in"),
]  # fmt: skip


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The least config, pictures of two sizes, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("least")
    root = write_binary(folder / "data", "0.png", "1.png")
    for kind in ("images", "masks"):
        Image.open(root / kind / "1.png").crop((0, 0, 64, 48)).save(root / kind / "1.png")
    config = binary_config(root, folder / "own.py")
    train_seg.main([config, "--work-dir", str(folder / "work")])
    (saved,) = (folder / "work").glob("*.pth")
    return config, str(saved)


@pytest.mark.parametrize(("tool", "options", "named"), LATE, ids=str)
def test_mistakes_that_show_in_the_first_batch_are_named(
    tool: str, options: list[str], named: str, least: tuple[str, str], tmp_path: Path
) -> None:
    main, argv = (train_seg.main, least[:1]) if tool == "train" else (eval_seg.main, least)
    said = failure(main, [*argv, "--work-dir", str(tmp_path), "--cfg-options", *options]).partition(": ")[2]
    assert said.startswith(named) and said.endswith(f"the full traceback is in {tmp_path / 'errors.log'}")
    assert ("has no data_preprocessor" in said) == ("model.data_preprocessor=None" in options)
    assert ("in_index of a head" in said) == ("model.decode_head.in_index=3" in options)
    assert "Traceback" in (tmp_path / "errors.log").read_text()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["cut off", "empty"])
def test_masks_that_were_not_looked_at_before_are_named_too(
    kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large data sets, only a sample is read before the training."""
    root = write_binary(tmp_path / "data", *(f"{number}.png" for number in range(3)))
    monkeypatch.setattr(mask_pixels_per_class, "MOST", 1)
    path = root / "masks" / "2.png"
    path.write_bytes(path.read_bytes()[: 60 if kind == "cut off" else 0])
    argv = ["--work-dir", str(tmp_path / "work"), "--cfg-options", f"train_dataloader.num_workers={workers}"]
    options = ["train_dataloader.batch_size=3"]
    found = failure(train_seg.main, [binary_config(root, tmp_path / "own.py"), *argv, *options])
    assert found.startswith(f"train_seg: {path} is not a readable mask (")


@pytest.mark.parametrize("sample", [1000, 1])
def test_cut_off_jpegs_are_named(sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_binary(tmp_path / "data", "0.jpg", "1.jpg")
    for path in (root / "masks").glob("*.jpg"):
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(path.with_suffix(".png"))
        path.unlink()
    config = binary_config(root, tmp_path / "own.py")
    options = ["--cfg-options", *(f"{split}_dataloader.dataset.img_suffix=.jpg" for split in ("train", "test"))]
    train_seg.main([config, "--work-dir", str(tmp_path / "work"), *options])
    (saved,) = (tmp_path / "work").glob("*.pth")
    path = root / "images" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(mask_pixels_per_class, "MOST", sample)
    says = f"1 of 2 images are JPEG files that are cut off, .* {path}" if sample > 1 else f"{path} is a JPEG .* cut off"
    for main, argv in ((train_seg.main, [config]), (eval_seg.main, [config, str(saved)])):
        assert re.search(says, failure(main, [*argv, "--work-dir", str(tmp_path / "again"), *options]))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_end_a_run_in_a_line(workers: int, tmp_path: Path) -> None:
    root = write_binary(tmp_path / "data", "0.png", "1.png")
    config = binary_config(root, tmp_path / "own.py")
    work = ["--work-dir", str(tmp_path / "work"), "--cfg-options"]
    train_seg.main([config, *work[:2]])
    (saved,) = (tmp_path / "work").glob("*.pth")
    (root / "images" / "1.png").write_bytes((root / "images" / "1.png").read_bytes()[:60])
    expected = f"{root}/images/1.png is not a readable image"
    assert expected in failure(train_seg.main, [config, *work, f"train_dataloader.num_workers={workers}"])
    argv = [config, str(saved), *work, f"test_dataloader.num_workers={workers}"]
    for tta in ([], ["--tta"]):
        assert expected in failure(eval_seg.main, [*argv, *tta])


def test_masks_of_the_data_set_are_not_overwritten(tmp_path: Path) -> None:
    config = binary_config(write_binary(tmp_path / "data", "0.png"), tmp_path / "own.py")
    argv = [config, "any.pth", "--work-dir", str(tmp_path), "--out", str(tmp_path / "data" / "masks")]
    assert "whose files it would replace" in failure(eval_seg.main, argv)

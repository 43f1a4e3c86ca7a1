"""MMSegmentation host: equal to its ViT, at home in its registry, segmentors, checkpoints and optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from support.references import noise, randomise

pytest.importorskip("mmseg")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mmengine.config import ConfigDict
    from mmengine.logging import MessageHub
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS as ROOT_MODELS
    from mmengine.runner import Runner, load_checkpoint
    from mmengine.structures import PixelData
    from mmseg.models.backbones import VisionTransformer
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

import apt_dense
from apt_dense.hosts.mmseg import APTViT, layer_of
from apt_dense.weights.load import load_backbone

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLASSES = 3
PREPROCESSOR = {
    "type": "SegDataPreProcessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "size_divisor": 16,
}


@pytest.fixture(scope="module", autouse=True)
def _mmseg_scope() -> None:
    register_all_modules(init_default_scope=True)


@pytest.fixture
def hub() -> Iterator[MessageHub]:
    """The current message hub, with nothing of other tests in it."""
    hub = MessageHub.get_current_instance()
    hub.log_scalars.pop("train/tokens_kept", None)
    yield hub
    hub.log_scalars.pop("train/tokens_kept", None)


def backbone(seed: int = 0, **options: Any) -> APTViT:
    return randomise(APTViT(**{**SMALL, "thresholds": (4.0,), **options}), 0.2, seed)


def half_flat(*size: int) -> Tensor:
    """A batch of two normalised images of noise, flat on the left."""
    batch = noise(2, 3, *size)
    batch[..., : size[1] // 2] = 0.5
    return batch


# ---- identity with MMSeg's VisionTransformer


def mmseg_vit(**options: Any) -> VisionTransformer:
    """MMSeg's own ViT with random weights. Its eval() returns None, so it does not chain."""
    model = VisionTransformer(
        **{
            "img_size": 32,
            "patch_size": 8,
            "embed_dims": 16,
            "num_layers": 2,
            "num_heads": 2,
            "patch_bias": True,
            "norm_cfg": {"type": "LN", "eps": 1e-6},
            **options,
        }
    )
    model.eval()
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        norm_weight = "ln" in name and name.endswith("weight")
        parameter.data = noise(*parameter.shape, seed=seed) * 0.2 + norm_weight
    return model


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (24, 16), (30, 45), (5, 40)], ids=str)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"final_norm": True}, {"final_norm": True}),
        ({"with_cls_token": False}, {"class_token": False}),
        ({"patch_bias": False, "norm_cfg": {"type": "LN"}}, {"patch_bias": False, "norm_eps": 1e-5}),
        ({"out_indices": (0, 1), "final_norm": True}, {"out_indices": (0, 1), "final_norm": True}),
        ({"out_indices": 0}, {"out_indices": 0}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_plain_vit_is_mmsegs(theirs: dict, ours: dict, size: tuple[int, int]) -> None:
    vit, model = mmseg_vit(**theirs), APTViT(**{**SMALL, "class_token": True, **ours}).eval()
    load_backbone(model, vit.state_dict())
    batch = noise(2, 3, *size)
    expected, maps = vit(batch), model(batch)
    assert len(maps) == len(expected) and maps[-1].std() > 0.3
    for map_, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(map_, other, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_plain_vit_of_another_img_size_is_mmsegs() -> None:
    vit = mmseg_vit(img_size=(48, 32))
    model = APTViT(**{**SMALL, "img_size": (48, 32)}, class_token=True).eval()
    load_backbone(model, vit.state_dict())
    batch = noise(1, 3, 40, 56)
    torch.testing.assert_close(model(batch)[0], vit(batch)[0], atol=1e-4, rtol=0)


def test_the_host_and_the_core_are_the_same_model() -> None:
    host = backbone()
    core = apt_dense.APTViT(**SMALL, thresholds=(4.0,), pos_antialias=False).eval()
    core.load_state_dict(host.state_dict(), strict=True)
    assert torch.equal(host(half_flat(40, 48))[0], core(half_flat(40, 48))[0])


# ---- registry and arguments


@pytest.mark.parametrize("registry", [MODELS, ROOT_MODELS])
def test_built_from_a_config(registry: Any) -> None:
    config = ConfigDict(type="APTViT", **SMALL, thresholds=[5.5, 4.0], out_indices=[0, 1], pixel_mean=[128.5] * 3)
    model = registry.build(config)
    assert type(model) is APTViT and isinstance(model, apt_dense.APTViT)
    assert model.thresholds == (5.5, 4.0) and model.out_indices == (0, 1)


@pytest.mark.parametrize(("out_indices", "count"), [(0, 1), (-1, 1), (1, 1), ((0, 1), 2), ([1], 1)])
def test_outputs_are_a_tuple(out_indices: Any, count: int) -> None:
    maps = backbone(out_indices=out_indices)(half_flat(32, 48))
    assert type(maps) is tuple and len(maps) == count
    assert all(map_.shape == (2, 16, 4, 6) for map_ in maps)


@pytest.mark.parametrize("frozen_stages", [-2, 3, 12])
def test_frozen_stages_out_of_range(frozen_stages: int) -> None:
    with pytest.raises(ValueError, match=f"frozen_stages={frozen_stages} must be from -1 to the number of blocks, 2"):
        backbone(frozen_stages=frozen_stages)


def test_pretrained_and_init_cfg_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="pretrained and init_cfg both"):
        APTViT(**SMALL, pretrained="a.pth", init_cfg={"type": "Pretrained", "checkpoint": "b.pth"})


def test_mmsegs_own_argument_names_are_refused() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        APTViT(embed_dims=16)


# ---- training


@pytest.mark.parametrize(("frozen_stages", "frozen"), [(-1, set()), (0, {"patch_embed", "pos_embed", "cls_token"})])
def test_frozen_embedding(frozen_stages: int, frozen: set[str]) -> None:
    assert frozen_names(backbone(frozen_stages=frozen_stages, class_token=True)) == frozen
    embedding = backbone(frozen_stages=frozen_stages, class_token=True, reg_tokens=2, pre_norm=True)
    assert frozen_names(embedding) == frozen | ({"reg_token", "norm_pre"} if frozen else set())


@pytest.mark.parametrize("frozen_stages", [1, 2])
def test_frozen_blocks(frozen_stages: int) -> None:
    blocks = {f"blocks.{i}" for i in range(frozen_stages)}
    model = backbone(frozen_stages=frozen_stages)
    assert frozen_names(model) == {"patch_embed", "pos_embed"} | blocks
    # A training loop calls train() before every epoch.
    model.train()
    assert frozen_names(model) == {"patch_embed", "pos_embed"} | blocks
    assert [block.training for block in model.blocks] == [i >= frozen_stages for i in range(2)]
    assert not model.patch_embed.training and model.coarse_embed.training


def frozen_names(model: APTViT) -> set[str]:
    """The parts of the model that have no trainable parameter; fails for parts frozen by half."""
    parts: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        depth = 2 if name.startswith("blocks.") else 1
        parts.setdefault(".".join(name.split(".")[:depth]), set()).add(parameter.requires_grad)
    assert all(len(states) == 1 for states in parts.values())
    return {part for part, states in parts.items() if states == {False}}


@pytest.mark.parametrize("with_cp", [False, True])
def test_frozen_parts_get_no_gradient_and_all_others_do(with_cp: bool) -> None:
    model = backbone(frozen_stages=1, with_cp=with_cp).train()
    model(half_flat(32, 32))[0].sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_changes_nothing() -> None:
    outputs = []
    for with_cp in (False, True):
        model = backbone(with_cp=with_cp).train()
        out = model(half_flat(32, 32))[0]
        out.square().sum().backward()
        outputs.append((out.detach(), model.pos_embed.grad))
    assert model.checkpoint_blocks
    for plain, checkpointed in zip(*outputs, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval(norm_eval: bool) -> None:
    model = backbone(norm_eval=norm_eval, final_norm=True)
    assert model.train() is model
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5 and all(norm.training != norm_eval for norm in norms)
    assert model.blocks[0].attn.training and not model.eval().training


def test_tokens_kept_are_logged_in_training_only(hub: MessageHub) -> None:
    model = backbone()
    batch = half_flat(32, 64)
    model(batch)
    assert "train/tokens_kept" not in hub.log_scalars
    model.train()(batch)
    # Half of each image is cut into patches of 2 x 2 cells.
    assert hub.get_scalar("train/tokens_kept").current() == pytest.approx(0.5 + 0.5 / 4)


# ---- weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(backbone(1).state_dict(), path)
    return path


def loaded(model: APTViT, seed: int = 1) -> bool:
    """Whether a model holds the weights of ``backbone(seed)`` wherever both have them."""
    expected = backbone(seed).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items() if name in expected)


@pytest.mark.parametrize("argument", ["pretrained", "init_cfg", "prefix"])
def test_pretrained_weights(weights: Path, argument: str) -> None:
    if argument == "pretrained":
        model = backbone(pretrained=str(weights))
    elif argument == "init_cfg":
        model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights)})
    else:
        state = {f"student.encoder.{name}": value for name, value in torch.load(weights).items()}
        torch.save({"state_dict": state, "meta": {}}, weights)
        model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights), "prefix": "student.encoder"})
    assert not loaded(model)
    model.init_weights()
    assert loaded(model) and model.is_init


def test_a_home_directory_is_understood(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(weights.parent))
    model = backbone(pretrained="~/weights.pth")
    model.init_weights()
    assert loaded(model)


def test_weights_of_mmsegs_vit_with_resized_positions(tmp_path: Path) -> None:
    vit, path = mmseg_vit(img_size=64), tmp_path / "vit.pth"
    torch.save({"state_dict": vit.state_dict()}, path)
    model = backbone(class_token=True, pretrained=str(path))
    model.init_weights()
    assert torch.equal(model.blocks[1].mlp.fc1.weight, vit.layers[1].ffn.layers[0][0].weight)
    assert torch.equal(model.pos_embed[:, 0], vit.pos_embed[:, 0])


def test_wrong_prefix_is_named(weights: Path) -> None:
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights), "prefix": "encoder."})
    with pytest.raises(ValueError, match="no weight of the checkpoint starts with prefix='encoder.'"):
        model.init_weights()


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_do_not_fit(weights: Path, strict: bool) -> None:
    state = torch.load(weights)
    state["blocks.0.ls1.gamma"] = torch.ones(16)
    torch.save(state, weights)
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights), "strict": strict})
    if strict:
        with pytest.raises(ValueError, match=r"weights\.pth: .*1 unexpected \(blocks\.0\.ls1\.gamma\)"):
            model.init_weights()
        assert not loaded(model)
    else:
        model.init_weights()
        assert loaded(model)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.pth does not exist"):
        backbone(pretrained=str(tmp_path / "none.pth")).init_weights()


def test_checkpoints_of_mmengine_load_without_running_pickled_code(tmp_path: Path) -> None:
    """As Runner.save_checkpoint writes them: with log buffers of numpy numbers and a whole segmentor."""
    hub = MessageHub("log of a training")
    for step in range(3):
        hub.update_scalar("train/loss", np.float64(step))
        hub.update_scalar("train/acc", torch.tensor(0.5))
    hub.update_info("iter", 3)
    state = {f"backbone.{name}": value for name, value in backbone(1).state_dict().items()}
    content = {
        "meta": {"epoch": 0, "iter": 3, "cfg": "model = dict()", "dataset_meta": {"classes": ("a", "b")}, "seed": 1},
        "state_dict": {**state, "decode_head.conv_seg.weight": torch.zeros(2)},
        "message_hub": hub.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "param_schedulers": [{"last_step": 3}],
    }
    torch.save(content, tmp_path / "iter_3.pth")
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "iter_3.pth")})
    model.init_weights()
    assert loaded(model)


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes timm build small models with random weights instead of fetching pretrained ones; returns their options."""
    create, options = timm.create_model, {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}

    def create_small(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        assert pretrained
        return randomise(create(name, pretrained=False, **kwargs, **options), 0.2)

    monkeypatch.setattr(timm, "create_model", create_small)
    return options


@pytest.mark.usefixtures("small_timm")
def test_weights_of_timm_by_name() -> None:
    model = APTViT(**SMALL, class_token=True, final_norm=True, pretrained="timm://vit_tiny_patch16_224").eval()
    model.init_weights()
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=True, img_size=32, num_classes=0)
    batch = half_flat(32, 32)
    expected = theirs.forward_features(batch)[:, 1:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"num_heads": 4}, "num_heads=4"),
        ({"act_layer": "gelu_tanh"}, "act_layer=gelu_tanh"),
        ({"init_values": 0.1}, "ls1"),
    ],
)
def test_models_of_timm_that_differ_are_refused(theirs: dict, named: str, small_timm: dict[str, Any]) -> None:
    """Also where all shapes fit, so that only the model tells."""
    small_timm.update(theirs)
    model = APTViT(**SMALL, class_token=True, final_norm=True, pretrained="timm://vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=named):
        model.init_weights()


def test_without_weights_the_zero_initialised_parts_stay_zero() -> None:
    model = APTViT(**SMALL, thresholds=(4.0,))
    model.init_weights()
    assert not model.coarse_embed.zero.weight.any() and model.blocks[0].attn.qkv.weight.std() > 0.01


def test_an_init_cfg_for_all_linear_layers_keeps_the_zero_initialised_parts_zero() -> None:
    model = APTViT(**SMALL, thresholds=(4.0,), init_cfg={"type": "TruncNormal", "layer": "Linear", "std": 0.5})
    model.init_weights()
    assert model.blocks[0].attn.qkv.weight.std() > 0.2 and not model.coarse_embed.zero.weight.any()


# ---- segmentors

FCN = {
    "type": "FCNHead",
    "in_channels": 16,
    "channels": 8,
    "num_convs": 1,
    "concat_input": False,
    "num_classes": CLASSES,
    "norm_cfg": {"type": "BN"},
    "loss_decode": {"type": "CrossEntropyLoss"},
}
UPER = {**FCN, "type": "UPerHead", "in_channels": [16, 16], "in_index": [0, 1], "pool_scales": (1, 2)}
del UPER["num_convs"], UPER["concat_input"]
SEGMENTORS = {
    "fcn": {"backbone": {"out_indices": -1}, "decode_head": FCN},
    "upernet": {
        "backbone": {"out_indices": (0, 1)},
        "neck": {"type": "MultiLevelNeck", "in_channels": [16, 16], "out_channels": 16, "scales": [2, 1]},
        "decode_head": UPER,
        "auxiliary_head": {**FCN, "in_index": 1},
    },
}
TEST_MODES = {"whole": {"mode": "whole"}, "slide": {"mode": "slide", "crop_size": (32, 32), "stride": (21, 21)}}


def segmentor(kind: str = "fcn", mode: str = "whole", **options: Any) -> nn.Module:
    config = {**SEGMENTORS[kind]}
    config["backbone"] = {"type": "APTViT", **SMALL, "thresholds": (4.0,), **config["backbone"], **options}
    return MODELS.build(
        ConfigDict(type="EncoderDecoder", data_preprocessor=PREPROCESSOR, test_cfg=TEST_MODES[mode], **config)
    )


def samples(*size: int) -> dict[str, list]:
    """Two 8-bit BGR images, flat on the left, with their masks."""
    generator = torch.Generator().manual_seed(0)
    inputs, data_samples = [], []
    for _ in range(2):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        image[..., : size[1] // 2] = 90
        mask = torch.randint(0, CLASSES, (1, *size), generator=generator)
        sample = SegDataSample(gt_sem_seg=PixelData(data=mask))
        sample.set_metainfo({"ori_shape": size, "img_shape": size, "pad_shape": size, "padding_size": [0, 0, 0, 0]})
        inputs.append(image)
        data_samples.append(sample)
    return {"inputs": inputs, "data_samples": data_samples}


@pytest.mark.parametrize("size", [(32, 32), (48, 80)], ids=str)
@pytest.mark.parametrize("drop_padding", [False, True])
@pytest.mark.parametrize("kind", SEGMENTORS)
def test_a_segmentor_trains(kind: str, drop_padding: bool, size: tuple[int, int]) -> None:
    model = segmentor(kind, drop_padding=drop_padding).train()
    model.data_preprocessor.size, model.data_preprocessor.size_divisor = (64, 96), None
    data = model.data_preprocessor(samples(*size), training=True)
    assert data["inputs"].shape == (2, 3, 64, 96)
    losses = model.loss(**data)
    total = sum(value for name, value in losses.items() if "loss" in name)
    total.backward()
    assert total.isfinite()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("size", [(32, 32), (50, 70)], ids=str)
@pytest.mark.parametrize("mode", TEST_MODES)
@pytest.mark.parametrize("kind", SEGMENTORS)
def test_a_segmentor_predicts_masks_of_the_image_size(kind: str, mode: str, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        results = segmentor(kind, mode).eval().test_step(samples(*size))
    for result in results:
        assert result.pred_sem_seg.data.shape == (1, *size)
        assert result.seg_logits.data.shape == (CLASSES, *size) and result.seg_logits.data.isfinite().all()


@torch.inference_mode()
def test_flipped_images_are_cut_up_as_mirror_images() -> None:
    """Test-time augmentation flips: patches follow where the grid divides."""
    model = segmentor().eval()
    batch = model.data_preprocessor(samples(32, 64))["inputs"]
    scale_map, flipped = (model.backbone.partition(x) for x in (batch, batch.flip(3)))
    assert torch.equal(flipped.flip(2), scale_map) and len(scale_map.unique()) == 2
    assert model.encode_decode(batch.flip(3), [{"img_shape": (32, 64)}] * 2).shape == (2, CLASSES, 32, 64)


def test_pretrained_at_the_level_of_the_segmentor(weights: Path) -> None:
    config = {"backbone": {"type": "APTViT", **SMALL, "thresholds": (4.0,)}, "decode_head": FCN}
    model = MODELS.build(ConfigDict(type="EncoderDecoder", pretrained=str(weights), **config))
    model.init_weights()
    assert loaded(model.backbone)


def test_a_state_saved_by_the_runner_gives_the_same_output(tmp_path: Path) -> None:
    """After a step of training, as CheckpointHook saves it: in a new segmentor, and in a backbone alone."""
    model, before = segmentor(), noise(1, 3, 32, 48)
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader={"dataset": [{k: v[i] for k, v in samples(32, 48).items()} for i in range(2)], "batch_size": 2,
                          "sampler": {"type": "DefaultSampler"}, "collate_fn": {"type": "pseudo_collate"}},
        train_cfg={"by_epoch": False, "max_iters": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 1}},
        default_scope="mmseg",
        experiment_name=tmp_path.name,
    )  # fmt: skip
    started = {name: value.clone() for name, value in model.state_dict().items()}
    runner.train()
    assert not torch.equal(model.backbone.coarse_embed.zero.bias, started["backbone.coarse_embed.zero.bias"])
    path = str(tmp_path / "iter_1.pth")
    fresh = segmentor()
    load_checkpoint(fresh, path, strict=True)
    alone = backbone(2, pretrained=path, class_token=model.backbone.cls_token is not None)
    alone.init_weights()
    with torch.no_grad():
        (expected,) = model.eval().backbone(before)
        assert torch.equal(fresh.eval().backbone(before)[0], expected) and torch.equal(alone(before)[0], expected)
        logits, found = (m.encode_decode(before, [{"img_shape": (32, 48)}]) for m in (model, fresh))
        assert torch.equal(found, logits)


def test_a_segmentor_initialises_the_backbone_once(weights: Path) -> None:
    model = segmentor(pretrained=str(weights))
    model.init_weights()
    assert loaded(model.backbone)
    assert model.backbone.coarse_embed.zero.weight.any()


# ---- learning rate decay


def optimizer_groups(model: nn.Module, paramwise_cfg: dict | None = None) -> list[dict]:
    config = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
        "constructor": "APTLearningRateDecayOptimWrapperConstructor",
        "paramwise_cfg": paramwise_cfg or {"decay_rate": 0.5},
    }
    return build_optim_wrapper(model, ConfigDict(config)).optimizer.param_groups


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = segmentor("upernet", class_token=True, final_norm=True)
    groups = optimizer_groups(model)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_rates_fall_towards_the_embedding() -> None:
    groups = optimizer_groups(segmentor(class_token=True, final_norm=True))
    settings = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    expected = {
        "backbone.patch_embed.proj.weight": (0.125, 0.05),
        "backbone.patch_embed.proj.bias": (0.125, 0.0),
        "backbone.pos_embed": (0.125, 0.0),
        "backbone.cls_token": (0.125, 0.0),
        "backbone.blocks.0.attn.qkv.weight": (0.25, 0.05),
        "backbone.blocks.0.norm1.weight": (0.25, 0.0),
        "backbone.blocks.1.mlp.fc2.weight": (0.5, 0.05),
        "backbone.blocks.1.mlp.fc2.bias": (0.5, 0.0),
        "backbone.norm.weight": (1.0, 0.0),
        "backbone.coarse_embed.down.weight": (1.0, 0.05),
        "backbone.coarse_embed.zero.bias": (1.0, 0.0),
        "decode_head.conv_seg.weight": (1.0, 0.05),
        "decode_head.convs.0.bn.weight": (1.0, 0.0),
    }
    assert {name: settings[name] for name in expected} == expected


def test_num_layers_replaces_the_depth() -> None:
    groups = optimizer_groups(segmentor(), {"decay_rate": 0.5, "num_layers": 4})
    assert min(group["lr"] for group in groups) == 0.5**5 and max(group["lr"] for group in groups) == 1.0


def test_frozen_parameters_are_left_out() -> None:
    groups = optimizer_groups(segmentor(frozen_stages=2))
    names = [name for group in groups for name in group["param_names"]]
    assert "backbone.coarse_embed.down.weight" in names and "decode_head.conv_seg.bias" in names
    assert not any(name.startswith(("backbone.blocks", "backbone.pos_embed", "backbone.patch_embed")) for name in names)


def test_a_missing_decay_rate_is_named() -> None:
    with pytest.raises((KeyError, ValueError), match="decay_rate"):
        optimizer_groups(segmentor(), {"num_layers": 4})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.pos_embed", 0),
        ("backbone.cls_token", 0),
        ("backbone.reg_token", 0),
        ("backbone.norm_pre.weight", 0),
        ("backbone.patch_embed.proj.bias", 0),
        ("backbone.blocks.0.norm1.weight", 1),
        ("backbone.blocks.11.norm1.weight", 12),
        ("backbone.norm.bias", 13),
        ("backbone.coarse_embed.zero.weight", 13),
        ("decode_head.blocks.0.weight", 13),
        ("neck.convs.0.conv.weight", 13),
    ],
)
def test_layer_of(name: str, layer: int) -> None:
    assert layer_of(name, 12) == layer

"""How weights of other ViTs reach a backbone: from timm's models, from files, and through ``load_state_dict``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt_dense.weights.arguments_from_file import arguments_of, grid_of
from apt_dense.weights.arguments_in_own_metadata import note_options
from apt_dense.weights.files import CheckpointError, read_checkpoint
from apt_dense.weights.load import LoadReport, convert_below, load_backbone
from apt_dense.weights.resize import Grid, grid_in, note_grid
from apt_dense.weights.timm_arguments import (
    apt_arguments,
    create_timm_model,
    timm_model_without_weights,
    weights_of,
)


class LoadableViT(nn.Module):
    """A base of backbones built from keyword arguments, into which the weights of all known ViTs can be loaded."""

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool | str | Path = False,
        img_size: int | tuple[int, int] | None = None,
        grid: Grid | None = None,
        **options: Any,
    ) -> "LoadableViT":
        """Build an adaptive ViT with the architecture and the weights of one of timm's.

        AugReg, DeiT, DeiT-3, MAE, CLIP, SigLIP, BEiT-3, DINOv2, EVA, EVA-02, DINOv3, PE, AIMv2 and their like, without
        pooling heads, and SAM's encoder.

        Args:
            model: a timm name such as "vit_base_patch16_224.mae", or a timm ``VisionTransformer`` or ``Eva``.
            pretrained: True loads timm's pretrained weights; a path those of a file, in any format that
                ``load_backbone`` reads.
            img_size: as for ``timm.create_model``: positions are resampled. None keeps the model's own.
            grid: rows and columns of the positions in the file ``pretrained``, as for ``load_backbone``.
            **options: any argument of :class:`APTViT`; by default the last block's output is returned, normalised if
                the model has a final norm, and pixels are normalised as the model expects. Another ``patch_size`` than
                the model's resamples its patch embedding (FlexiViT's way, by timm): 16 for pyramids, whose strides are
                powers of 2.

        Raises:
            FileNotFoundError: if ``pretrained`` is text and no file.
            ValueError: for an unknown name, or a model with a feature that is not supported (before any weight is
                copied), and for a file that does not fit.
        """
        file = weights_file(pretrained)
        patch_size = options.get("patch_size")
        if isinstance(model, nn.Module):
            if pretrained or img_size is not None:
                raise ValueError("pretrained and img_size go with a model's name; this model is built already")
            content = weights_of(model)
        elif file is None:
            model = create_timm_model(model, bool(pretrained), img_size, patch_size)
            content = weights_of(model)
        else:
            model, content = timm_model_without_weights(model, img_size=img_size, patch_size=patch_size), file
        backbone = cls(**{**apt_arguments(model), **options})
        load_backbone(backbone, content, resize_patches=patch_size is not None, grid=grid)
        return backbone

    @classmethod
    def from_weights(
        cls,
        checkpoint: Mapping | str | Path,
        img_size: int | tuple[int, int] | None = None,
        grid: Grid | None = None,
        **options: Any,
    ) -> "LoadableViT":
        """Build an adaptive ViT with the architecture and the weights of a checkpoint.

        Width, depth, patches, tokens, norms, LayerScale, MLP, biases and positions follow from names and shapes; what
        these do not tell (the number of heads, often) is asked for by name. Files of our own models tell everything.

        Args:
            checkpoint: a file, or the content of one, in any format that ``load_backbone`` reads.
            img_size: pixels, or (H, W), that positions are resampled to; None keeps those of the checkpoint.
            grid: rows and columns of the checkpoint's positions, where they are not a square.
            **options: any argument of :class:`APTViT`, in place of what the checkpoint tells. Another ``patch_size``
                resamples the patch embedding, as in :meth:`from_timm`. Unless given, ``pixel_mean`` and ``pixel_std``
                are ImageNet's.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the checkpoint is not a whole backbone, or does not tell an argument that is not given.
        """
        content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(Path(checkpoint).expanduser())
        try:
            backbone = cls(**arguments_of(content, img_size, grid, **options))
            load_backbone(backbone, content, resize_patches="patch_size" in options, grid=grid_of(content, grid))
        except ValueError as error:
            if isinstance(checkpoint, Mapping):
                raise
            raise CheckpointError(f"{checkpoint}: {error}") from error
        return backbone

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Note in torch's metadata what names and shapes do not tell, such as the grid of the positions: their number
        does not tell 16 x 4 from 8 x 8."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_grid(destination, prefix, self.pos_grid)
        note_options(destination, prefix, self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Convert the state dict first, so that ``load_state_dict`` takes those of all ViTs in ``formats.py``."""
        try:
            report = convert_below(self, state_dict, prefix, grid_in(local_metadata))
            error_msgs.extend(self._loading_errors(report, prefix))
        except ValueError as error:
            error_msgs.append(str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _loading_errors(self, report: LoadReport, prefix: str) -> Iterable[str]:
        """Complaints about what a host's checkpoints must not lack, although the host loads without ``strict``."""
        return ()


def weights_file(pretrained: object) -> Path | None:
    """The file that an argument ``pretrained`` names; None for True and False.

    Raises:
        FileNotFoundError: for text that names no file, which must not pass for True.
        TypeError: for anything else.
    """
    if isinstance(pretrained, bool):
        return None
    if not isinstance(pretrained, str | Path):
        raise TypeError(f"pretrained={pretrained!r} must be True, False or the path of a file of weights")
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained={str(pretrained)!r}: there is no such file; give the path of one, or True for timm's weights"
        )
    return path

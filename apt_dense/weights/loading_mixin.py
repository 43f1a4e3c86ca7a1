"""How weights of other ViTs reach a backbone: from timm's models, and through ``load_state_dict``."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from apt_dense.weights.load import LoadReport, convert_below, load_backbone
from apt_dense.weights.resize import note_grid
from apt_dense.weights.timm_arguments import apt_arguments, create_timm_model


class LoadableViT(nn.Module):
    """A base of backbones built from keyword arguments, into which the weights of all known ViTs can be loaded."""

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        img_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> "LoadableViT":
        """Build an adaptive ViT with the architecture and the weights of one of timm's.

        AugReg, DeiT, DeiT-3, MAE, CLIP, SigLIP, BEiT-3, DINOv2, EVA, EVA-02, DINOv3, PE, AIMv2 and their like, without
        pooling heads, and SAM's encoder.

        Args:
            model: a timm name such as "vit_base_patch16_224.mae", or a timm ``VisionTransformer`` or ``Eva``.
            pretrained: load timm's pretrained weights.
            img_size: as for ``timm.create_model``: timm resamples the positions. None keeps the model's own.
            **options: any argument of :class:`APTViT`; by default the last block's output is returned, normalised if
                the model has a final norm, and pixels are normalised as the model expects.

        Raises:
            ValueError: for an unknown name, or a model with a feature that is not supported (before any weight is
                copied).
        """
        if isinstance(model, str):
            model = create_timm_model(model, pretrained, img_size)
        elif pretrained or img_size is not None:
            raise ValueError("pretrained and img_size go with a model's name; this model is built already")
        backbone = cls(**{**apt_arguments(model), **options})
        load_backbone(backbone, model.state_dict())
        return backbone

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Note the grid of the positions in torch's metadata: their number does not tell 16 x 4 from 8 x 8."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_grid(destination, prefix, self.pos_grid)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Convert the state dict first, so that ``load_state_dict`` takes those of all ViTs in ``formats.py``."""
        try:
            report = convert_below(self, state_dict, prefix, local_metadata.get("pos_grid"))
            error_msgs.extend(self._loading_errors(report, prefix))
        except ValueError as error:
            error_msgs.append(str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _loading_errors(self, report: LoadReport, prefix: str) -> Iterable[str]:
        """Complaints about what a host's checkpoints must not lack, although the host loads without ``strict``."""
        return ()

"""What a backbone says about its outputs, for heads and libraries that build on it."""

from timm.models import FeatureInfo


class DescribedOutputs:
    """A base of backbones that return one feature map of ``embed_dim`` channels and stride ``patch_size`` for each of
    ``out_indices``."""

    embed_dim: int
    patch_size: int
    out_indices: tuple[int, ...]

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.embed_dim,) * len(self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one cell of an output to the next, for each output."""
        return (self.patch_size,) * len(self.out_indices)

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, strides and modules as timm's ``features_only`` models give them: ``feature_info.channels()``,
        ``.reduction()``, ``.module_name()``."""
        entries = [
            {"num_chs": self.embed_dim, "reduction": self.patch_size, "module": f"blocks.{block}"}
            for block in range(self.out_indices[-1] + 1)
        ]
        return FeatureInfo(entries, self.out_indices)

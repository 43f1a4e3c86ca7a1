"""A model's choice of patches, and the one way to change it after the model was built."""

from dataclasses import replace
from typing import Any

from apt_dense.patches.selector import PatchSelector

#: What can be changed; the rest follows from a model's shape or its images.
CHANGEABLE = "thresholds", "token_budget", "min_tokens", "scorer", "keep_fine", "keep_coarse"


class ChoosesPatches:
    """A base of models that cut images by a :class:`PatchSelector`, ``patches``, which is replaced as a whole."""

    patches: PatchSelector

    patch_size = property(lambda self: self.patches.patch_size)
    thresholds = property(lambda self: self.patches.thresholds)
    token_budget = property(lambda self: self.patches.token_budget)
    drop_padding = property(lambda self: self.patches.drop_padding)
    pixel_format = property(lambda self: self.patches.pixel_format)
    window_size = property(lambda self: self.patches.window_size)

    def set_patches(self, **options: Any) -> None:
        """Cut images by other options from now on; those left out stay.

            model.set_patches(thresholds=(5.0, 3.5))
            model.set_patches(token_budget=0.6)
            model.set_patches(thresholds=(), token_budget=None)  # the plain ViT

        A compiled model makes another graph for another budget. Weights saved afterwards note these options.

        Args:
            **options: ``thresholds``, ``token_budget``, ``min_tokens``, ``scorer``, ``keep_fine`` or ``keep_coarse``,
                as for :class:`apt_dense.options.PatchOptions`. There may be more or fewer thresholds than before, since
                all scales share their weights.

        Raises:
            TypeError: for another option.
            ValueError: for values out of range, and thresholds for a model that was built without.
        """
        unknown = sorted(options.keys() - set(CHANGEABLE))
        if unknown:
            raise TypeError(f"set_patches cannot change {', '.join(unknown)}, only {', '.join(CHANGEABLE)}")
        patches = replace(self.patches, **options)
        if patches.thresholds and getattr(self, "coarse_embed", True) is None:
            raise ValueError(
                f"thresholds={patches.thresholds} for a model that was built with thresholds=(), which has no weights "
                f"for coarse patches; build it with thresholds, and load its weights"
            )
        self.patches = patches

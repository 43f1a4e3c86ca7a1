"""Other ways to spend fewer tokens, on the same weights: merging similar tokens, pruning, patches merged at random.

Plain forms of what is published, for comparisons at equal tokens. A rival keeps, averaged over its blocks, the share
that an adaptive model keeps in every block.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import APTViT
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.block import Block


class Tokens(NamedTuple):
    """The tokens of a batch between two blocks.

    Args:
        x: (B, T, C), prefix tokens first.
        sizes: (B, T), how many of the first tokens each stands for.
        place: (B, N), for each of the first tokens, the one that stands for it.
    """

    x: Tensor
    sizes: Tensor
    place: Tensor

    def restored(self) -> Tensor:
        """All first tokens (B, N, C), those that were merged alike."""
        return self.x.gather(1, self.place[..., None].expand(-1, -1, self.x.shape[2]))


class RivalViT(APTViT):
    """A uniform ViT with global attention whose blocks see fewer tokens; its maps have all cells.

    :meth:`keep` sets the share of the tokens that blocks see on average.
    """

    share = 1.0
    needs_class_token = False

    def keep(self, share: float) -> None:
        """Keep that share of the tokens.

        Raises:
            ValueError: for a share that cannot be kept, and a model of another kind.
        """
        options, blocks = self.options, self.block_options
        checks = {
            "thresholds": self.thresholds, "windows": options.windowed, "relative positions": options.use_rel_pos,
            "rotary positions": self.rotary, "convolutional residuals": options.residual_block_indexes,
            "drop path": options.drop_path_rate, "proportional attention": blocks.proportional_attention,
            "no class token": self.needs_class_token and not options.class_token,
        }  # fmt: skip
        unsupported = [name for name, value in checks.items() if value]
        if unsupported:
            raise ValueError(f"a rival cannot be built with {', '.join(unsupported)}: it is a plain uniform ViT")
        if not self.lowest_share <= share <= 1:
            raise ValueError(f"a rival of {self.depth} blocks keeps {self.lowest_share:.0%} to 100%, not {share:.0%}")
        self.share = share

    @property
    def lowest_share(self) -> float:
        """The smallest share that :meth:`keep` takes."""
        raise NotImplementedError

    def forward_tokens(self, images: Tensor, *_: None) -> tuple[tuple[Tensor, ...], TokenLayout]:
        """Packed rows of all cells, and where they belong, as ``APTViT.forward_tokens``."""
        x, layout, _ = self._tokens(images)
        x = self.norm_pre(layout.real_rows(x)).unflatten(0, (len(images), -1))
        return (self._normalise(self.run_blocks(x).flatten(0, 1), self.depth - 1),), layout

    def run_blocks(self, x: Tensor) -> Tensor:
        """All tokens (B, N, C) -> (B, N, C)."""
        raise NotImplementedError

    def counts(self, cells: int) -> list[int]:
        """Patches that attention sees in each block: fewer by the same number each time, all at first."""
        raise NotImplementedError

    def mean_count(self, cells: int) -> float:
        """Patches of an image with so many that a half of a block, attention or MLP, sees on average."""
        return sum(self.counts(cells)) / self.depth


def falling(cells: int, blocks: int, step: float) -> list[int]:
    """So many tokens, and each time fewer by that share of them."""
    return [round(cells * (1 - i * step)) for i in range(blocks)]


class MergingViT(RivalViT):
    """Token merging (arXiv 2210.09461): after each attention the most similar tokens, by their keys, are averaged, as
    many in every block; attention is proportional to what tokens stand for. At the end each cell gets its token."""

    @property
    def lowest_share(self) -> float:
        """At most half of the tokens can be merged at once. With as many each time, the last time decides."""
        return 1 - self._mean_merges / self.depth

    @property
    def _mean_merges(self) -> float:
        """Times that tokens were merged before attention and before an MLP, on average over both and all blocks."""
        return (self.depth - 1) * (self.depth + 1) / (2 * self.depth)

    def counts(self, cells: int) -> list[int]:
        return falling(cells, self.depth, (1 - self.share) / self._mean_merges)

    def mean_count(self, cells: int) -> float:
        counts = self.counts(cells)  # an MLP has the tokens of the next attention
        return (sum(counts) + sum(counts[1:]) + counts[-1]) / (2 * self.depth)

    def run_blocks(self, x: Tensor) -> Tensor:
        batch, total, _ = x.shape
        place = torch.arange(total, device=x.device).expand(batch, -1)
        tokens = Tokens(x, torch.ones(batch, total, device=x.device), place)
        counts = self.counts(total - self.num_prefix)
        for i, block in enumerate(self.blocks):
            x, keys, _ = attend(block, tokens.x, tokens.sizes.log()[:, None, None])
            tokens = tokens._replace(x=x)
            if i + 1 < self.depth:
                tokens = merged(tokens, keys, counts[i] - counts[i + 1], self.num_prefix)
            tokens = tokens._replace(x=transform(block, tokens.x))
        return tokens.restored()


class PruningViT(RivalViT):
    """Pruning with a way back (arXiv 2412.00965, 2202.07800): before each block those tokens leave that the class token
    attends to least in the block before, as many each time; all are there again in the last block."""

    needs_class_token = True

    @property
    def lowest_share(self) -> float:
        """None of the tokens would be left in the last block but one."""
        return 1 - (self.depth - 1) / (2 * self.depth)

    def counts(self, cells: int) -> list[int]:
        early = self.depth - 1
        step = 2 * (1 - self.share) * self.depth / (early * (early - 1))
        return [*falling(cells, early, step), cells]

    def run_blocks(self, x: Tensor) -> Tensor:
        counts = self.counts(x.shape[1] - self.num_prefix)
        whole, kept = x, torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for i, block in enumerate(self.blocks[:-1]):
            x, _, weights = attend(block, x, None)
            x = transform(block, x)
            whole = whole.scatter(1, kept[..., None].expand_as(x), x)
            if i + 2 < self.depth:
                best = weights[:, self.num_prefix :].topk(counts[i + 1]).indices + self.num_prefix
                stay = torch.cat([torch.arange(self.num_prefix, device=x.device).expand(len(x), -1), best], 1)
                x, kept = x.gather(1, stay[..., None].expand(-1, -1, x.shape[2])), kept.gather(1, stay)
        last = self.blocks[-1]
        return transform(last, attend(last, whole, None)[0])


def attend(block: Block, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a block on tokens (B, T, C).

    Args:
        bias: added to the logits, of a shape that broadcasts to (B, heads, T, T).

    Returns:
        Tokens (B, T, C), the mean of the heads' keys (B, T, D), and the mean weights (B, T) of the first token.
    """
    attn = block.attn
    q, k, v = (part.transpose(1, 2) for part in attn._project(block.norm1(x)))  # (B, heads, T, D)
    mask = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    first = (q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).float().softmax(-1)
    return x + block.ls1(attn.proj(attn.norm(out))), k.mean(1), first[:, :, 0].mean(1)


def transform(block: Block, x: Tensor) -> Tensor:
    """The second half of a block, its MLP."""
    return x + block.ls2(block.mlp(block.norm2(x)))


def merged(tokens: Tokens, keys: Tensor, count: int, num_prefix: int) -> Tokens:
    """Merge ``count`` tokens into others: every second token may go to the most similar of those between, and the most
    similar ones do. Prefix tokens stay."""
    x, sizes, place = tokens
    batch, total, channels = x.shape
    rows = torch.arange(num_prefix, total, device=x.device)
    sources, targets = rows[::2], rows[1::2]
    unit = F.normalize(keys.float(), dim=-1)
    best, target = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(-1)
    going = best.topk(count).indices  # (B, count) of the sources
    into = torch.arange(total, device=x.device).repeat(batch, 1)
    into.scatter_(1, sources[going], targets[target.gather(1, going)])
    weighted = torch.zeros_like(x).scatter_add(
        1, into[..., None].expand(-1, -1, channels), x * sizes[..., None].to(x.dtype)
    )
    added = torch.zeros_like(sizes).scatter_add(1, into, sizes)
    stays = added > 0
    order = stays.cumsum(1) - 1  # of those that stay
    x = (weighted[stays] / added[stays][:, None].to(x.dtype)).view(batch, total - count, channels)
    return Tokens(x, added[stays].view(batch, -1), order.gather(1, into.gather(1, place)))


def random_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> list[Tensor]:
    """A scorer by which patches are merged at random, of the same image the same ones each time."""
    sizes = [[n // (patch_size << scale) for n in pixels.shape[-2:]] for scale in scales]
    seeds = [torch.Generator().manual_seed(int(image.double().sum())) for image in pixels]
    drawn = [[torch.rand(size, generator=seed) for size in sizes] for seed in seeds]
    return [torch.stack(maps).to(pixels.device) for maps in zip(*drawn, strict=True)]


def mean_tokens(net: APTViT, images: Tensor) -> Tensor:
    """Patches that a block sees of each normalised image (B,), on average over blocks."""
    if not isinstance(net, RivalViT):
        return net.patches.count(images).sum(1)
    cells = math.prod(side // net.patch_size for side in images.shape[-2:])
    return images.new_full((len(images),), net.mean_count(cells))


RIVALS: dict[str, type[RivalViT]] = {"merging": MergingViT, "pruning": PruningViT}
RANDOM = "random"  # patches merged at random

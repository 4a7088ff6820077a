"""The CUTLASS variants that are built, as data, and which one each shape uses."""

from dataclasses import dataclass
from typing import Literal

Pair = tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """Compile-time shape of one fused GEMM.

    Attributes:
        op: of the MLP, `dpre` (backward), `up` (forward, two stores) or `activation` (forward
            without act_grad, one store); of a block, whose epilogues take over passes beside the
            products, `linear_add`, `up_scaled`, `dpre_scaled`, `norm_gradient`, `heads`,
            `exclude_self`, `linear_mix` or `linear_mix_skip`.
        tile: rows, columns and depth of a threadblock's tile.
        cluster: threadblocks that share loads by multicast, along M and N.
        epilogue: rows and columns the epilogue handles at a time.
        schedule: `PingPong` (two consumer groups take turns with whole tiles, so that one's
            epilogue hides behind the other's main loop) or `Cooperative` (both share a tile).
        stores: pieces of the epilogue that may be on their way to memory at once.
        loads: pieces of the GEMM's C operand, if it has one, that may be on their way from it.
        operand: where `dpre` takes act_grad from: an auxiliary load, or the GEMM's C operand.
    """

    op: Literal[
        "dpre",
        "up",
        "activation",
        "linear_add",
        "up_scaled",
        "dpre_scaled",
        "norm_gradient",
        "heads",
        "exclude_self",
        "linear_mix",
        "linear_mix_skip",
    ]
    tile: tuple[int, int, int]
    cluster: Pair
    epilogue: Pair
    schedule: Literal["PingPong", "Cooperative"]
    stores: int = 2
    loads: int = 4
    operand: Literal["kAux", "kSource"] = "kAux"

    @property
    def skip(self) -> bool:
        """Whether a skip joins; operators with one and without share a source."""
        return self.op == "linear_mix_skip"

    @property
    def threads(self) -> int:
        """Threads that share a tile's epilogue."""
        return {"PingPong": 128, "Cooperative": 256}[self.schedule]

    @property
    def signs_layout(self) -> tuple[tuple[int, int, int], Pair, str]:
        """What `up_scaled` and `dpre_scaled` must share for the one to read the other's signs."""
        return self.tile, self.epilogue, self.schedule

    @property
    def name(self) -> str:
        """Unique name, also of the C function."""
        shape = "x".join(map(str, self.tile))
        cluster = "x".join(map(str, self.cluster))
        epilogue = "x".join(map(str, self.epilogue))
        schedule = {"PingPong": "pingpong", "Cooperative": "cooperative"}[self.schedule]
        operand = f"_{self.operand[1:].lower()}" if self.op == "dpre" else ""
        buffers = f"s{self.stores}" + (f"_l{self.loads}" if self.loads != 4 else "")
        return f"{self.op}_{schedule}_{shape}_c{cluster}_e{epilogue}_{buffers}{operand}"


_ALL = (
    Variant("dpre", (128, 128, 64), (1, 2), (64, 64), "PingPong", operand="kSource"),
    Variant("dpre", (128, 128, 64), (2, 1), (64, 64), "PingPong", operand="kSource"),
    Variant("dpre", (128, 128, 64), (1, 1), (64, 64), "PingPong", operand="kSource"),
    Variant("dpre", (128, 128, 64), (1, 1), (64, 32), "PingPong"),
    Variant("dpre", (128, 256, 64), (2, 1), (128, 64), "Cooperative", operand="kSource"),
    Variant("up", (128, 128, 64), (1, 1), (64, 32), "PingPong"),
    Variant("up", (128, 128, 64), (1, 1), (64, 32), "PingPong", stores=4),
    Variant("up", (128, 128, 64), (2, 1), (64, 32), "PingPong"),
    Variant("up", (128, 128, 64), (2, 1), (64, 32), "PingPong", stores=4),
    Variant("up", (128, 256, 64), (2, 1), (128, 64), "Cooperative"),
    Variant("activation", (128, 128, 64), (1, 1), (64, 64), "PingPong"),
    Variant("linear_add", (128, 128, 64), (1, 2), (64, 64), "PingPong"),
    Variant("linear_add", (128, 256, 64), (2, 1), (128, 64), "Cooperative"),
    Variant("up_scaled", (128, 128, 64), (2, 1), (64, 64), "PingPong"),
    Variant("up_scaled", (128, 128, 64), (1, 2), (64, 64), "PingPong"),
    Variant("dpre_scaled", (128, 128, 64), (2, 1), (64, 64), "PingPong"),
    Variant("dpre_scaled", (128, 128, 64), (2, 1), (64, 64), "PingPong", loads=3),
    Variant("norm_gradient", (128, 128, 64), (1, 2), (64, 32), "PingPong"),
    Variant("norm_gradient", (128, 128, 64), (1, 2), (64, 64), "PingPong"),
    Variant("heads", (128, 128, 64), (1, 2), (64, 64), "PingPong"),
    Variant("heads", (128, 256, 64), (2, 1), (128, 64), "Cooperative"),
    Variant("exclude_self", (128, 128, 64), (1, 2), (64, 64), "PingPong"),
    Variant("exclude_self", (128, 128, 64), (1, 2), (64, 64), "PingPong", loads=3),
    Variant("linear_mix", (128, 128, 64), (1, 2), (64, 32), "PingPong", loads=3),
    Variant("linear_mix", (128, 128, 64), (1, 2), (64, 64), "PingPong", loads=3),
    Variant("linear_mix_skip", (128, 128, 64), (1, 2), (64, 32), "PingPong", loads=3),
    Variant("linear_mix_skip", (128, 128, 64), (1, 2), (64, 64), "PingPong", loads=3),
)
"""Fastest first, then what the kernel table compares it with; kernels/NOTES.md has those tried
and dropped."""

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}
"""Every variant by name."""


@dataclass(frozen=True)
class Plan:
    """A variant and its run-time choices.

    Attributes:
        variant: name in VARIANTS.
        raster_along_m: consecutive tiles along M (they share weights) instead of along N.
        max_swizzle: tiles are visited in bands this wide, for reuse in L2.
    """

    variant: str
    raster_along_m: bool = False
    max_swizzle: int = 1


DPRE_PLAN = Plan("dpre_pingpong_128x128x64_c1x2_e64x64_s2_source")
"""Fastest backward on an H100 at the record's shape; see kernels/NOTES.md."""

UP_PLAN = Plan("up_pingpong_128x128x64_c1x1_e64x32_s2", max_swizzle=2)
"""Fastest CUTLASS forward on an H100 at the record's shape; see kernels/NOTES.md."""

ACTIVATION_PLAN = Plan("activation_pingpong_128x128x64_c1x1_e64x64_s2", max_swizzle=2)
"""Fastest CUTLASS forward without act_grad on an H100; see kernels/NOTES.md."""

LINEAR_ADD_PLAN = Plan("linear_add_pingpong_128x128x64_c1x2_e64x64_s2", max_swizzle=2)
"""Fastest on an H100 at both of the record's shapes, as those below are at theirs, within 1 %; see
kernels/NOTES.md."""

UP_SCALED_PLAN = Plan("up_scaled_pingpong_128x128x64_c2x1_e64x64_s2", max_swizzle=2)

DPRE_SCALED_PLAN = Plan("dpre_scaled_pingpong_128x128x64_c2x1_e64x64_s2", max_swizzle=2)
"""Its variant must have the tile, epilogue piece and schedule of UP_SCALED_PLAN's, for it reads the
signs in the layout they are stored in."""

NORM_GRADIENT_PLAN = Plan("norm_gradient_pingpong_128x128x64_c1x2_e64x32_s2", max_swizzle=2)

HEADS_PLAN = Plan("heads_pingpong_128x128x64_c1x2_e64x64_s2", max_swizzle=2)

EXCLUDE_SELF_PLAN = Plan("exclude_self_pingpong_128x128x64_c1x2_e64x64_s2", max_swizzle=2)

LINEAR_MIX_PLAN = Plan("linear_mix_pingpong_128x128x64_c1x2_e64x32_s2_l3", max_swizzle=2)

LINEAR_MIX_SKIP_PLAN = Plan("linear_mix_skip_pingpong_128x128x64_c1x2_e64x32_s2_l3", max_swizzle=2)

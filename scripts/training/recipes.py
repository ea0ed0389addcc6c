"""Variants of the recipes that more than one paper's script compares with."""

from dataclasses import replace

from afpq.train import RECIPES, ConstantScale, FloatFormat, Operands, Recipe, Rounding

FLOAT32 = RECIPES["float32"]
_E5M2 = Rounding(FloatFormat(5, 2, reserved_codes=4, saturate=False))
E5M2 = Recipe(operands=Operands(_E5M2, _E5M2, _E5M2))
"""Operands in e5m2 and nothing else: the "plain FP8" that Cambier et al. 2020 (S2FP8) compare with."""
E5M2_SCALED = replace(E5M2, loss_scale=ConstantScale(100.0))


def plain_sums(recipe: Recipe) -> Recipe:
    """The recipe with sums in float32: emulated accumulators take ten times as long."""
    return replace(recipe, accumulator=None)


def nearest_updates(recipe: Recipe) -> Recipe:
    """The recipe with parameters and momentum rounded to nearest."""
    assert recipe.master is not None and recipe.state is not None
    return replace(
        recipe, master=Rounding(recipe.master.format), state=Rounding(recipe.state.format)
    )

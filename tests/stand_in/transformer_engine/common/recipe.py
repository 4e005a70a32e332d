"""Recipes: what is rounded how."""

from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    def __init__(self, *, fp8_format=Format.HYBRID, fp8_dpa=False, fp8_mha=False, **settings):
        self.fp8_format, self.fp8_dpa, self.fp8_mha = fp8_format, fp8_dpa, fp8_mha
        self.settings = settings


class DelayedScaling(Recipe):
    @property
    def amax_history_len(self):
        return self.settings.get("amax_history_len", 1)


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    pass

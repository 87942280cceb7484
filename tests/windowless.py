"""Conversion without a window: where texts are short, it would leave nothing to reduce."""

from functools import partial

from kvlatent.compress.convert import convert as convert_by_default

convert = partial(convert_by_default, window=0)

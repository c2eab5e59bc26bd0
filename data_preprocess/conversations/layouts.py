"""Layouts of records, in the order in which they are tried. A new one is one line here.

A layout is a function. It takes an open record and returns its sample with the names of the fields by which the layout
was told, or None if the record has another layout. For a record of this layout that is wrong, it raises ValueError with
a sentence.
"""

from collections.abc import Callable

from data_preprocess.conversations.gdgpt import gdgpt, gdgpt_without_its_field
from data_preprocess.conversations.one_turn import one_turn
from data_preprocess.conversations.preferences import chosen_and_rejected, half_a_pair, openai_preference
from data_preprocess.conversations.record import OpenRecord
from data_preprocess.conversations.samples import Sample
from data_preprocess.conversations.talk import talk

Layout = Callable[[OpenRecord], tuple[Sample, str] | None]

LAYOUTS: tuple[Layout, ...] = (
    chosen_and_rejected,
    half_a_pair,
    openai_preference,
    gdgpt,
    talk,
    one_turn,
    gdgpt_without_its_field,
)

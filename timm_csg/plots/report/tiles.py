"""The small pieces that pages are made of: images with heat maps, links, bars, table rows, explained answers."""

from __future__ import annotations

from collections.abc import Iterable

from timm_csg.explain import FilterEvidence, PathEvidence
from timm_csg.plots.report.book import Answer, Book, place_in_words
from timm_csg.plots.report.templates import Markup, element, fill, join, render
from timm_csg.plots.report.words import count, percent


def tile(book: Book, image: int, index: int, *, captioned: bool = True) -> Markup:
    """An image with the map of a filter."""
    findings = book.findings
    label = int(findings.targets[image])
    heat = book.maps.get((image, index))
    name = book.heat_name(image, index)
    place = ""
    if heat is not None:
        place = f"; filter {index} responds most at the {place_in_words(heat)}" if name else "; no response"
    parts = {
        "image": book.pictures.image(image),
        "alt": f"Image {image}, {book.names[label]}{place}",
        "heat": render("heat", heat=name) if name else Markup(""),
    }
    if not captioned:
        return render("bare-tile", **parts)
    kind = "own" if label == int(findings.owners[index]) else "foreign"
    return render("tile", kind=kind, caption=book.names[label], **parts)


def strip(tiles: Iterable[Markup]) -> Markup:
    """Tiles in a row."""
    return render("strip", tiles=join(tiles))


def link_class(book: Book, label: int) -> Markup:
    """The name of a class, as a link if it has a page."""
    if label not in book.classes:
        return fill("{name}", name=book.names[label])
    return fill('<a href="#class-{label}">{name}</a>', label=label, name=book.names[label])


def link_filter(book: Book, index: int) -> Markup:
    """The number of a filter, as a link if it has a page."""
    return Markup(f'<a href="#filter-{index}">{index}</a>' if index in book.filters else str(index))


def bar(share: float) -> Markup:
    """A bar, full at 1."""
    return render("bar", fraction=f"{100 * max(0.0, min(1.0, share)):.1f}")


def cells(*contents: tuple[str, object]) -> Markup:
    """A table row; the kind of a cell is ``"th"`` for its head, ``"num"`` for numbers, or nothing."""
    made = []
    for kind, content in contents:
        if kind == "th":
            made.append(element("th", content, 'scope="row"'))
        else:
            made.append(element("td", content, 'class="num"' if kind == "num" else ""))
    return element("tr", join(made))


def prediction(book: Book, answer: Answer) -> Markup:
    """An explained answer."""
    right, predicted, label = answer.is_right, book.names[answer.predicted], book.names[answer.label]
    name = "" if answer.heat is None else book.pictures.heat(answer.heat)
    where = ""
    if name and answer.heat is not None:
        where = f"; the evidence for {predicted} lies at the {place_in_words(answer.heat)}"
    picture = render(
        "bare-tile",
        image=book.pictures.image(answer.image),
        alt=f"Image {answer.image}, {label}{where}",
        heat=render("heat", heat=name) if name else Markup(""),
    )
    heading = fill("“{name}”", name=predicted)
    if not right:
        heading = fill("“{name}”, but it is “{label}”", name=predicted, label=label)
    other = Markup("")
    if answer.missing is not None:
        text = (
            f"For the right class, “{label}”, it found less: a score of {answer.missing.logit:.2f} against "
            f"{answer.evidence.logit:.2f}."
        )
        other = render("other", text=text, evidence=_evidence(book, answer, answer.missing, label))
    return render(
        "prediction",
        verdict="right" if right else "wrong",
        label=answer.label,
        badge="right" if right else "wrong",
        heading=heading,
        tile=picture,
        why=_why(answer, predicted),
        evidence=_evidence(book, answer, answer.evidence, predicted),
        other=other,
    )


def _why(answer: Answer, predicted: str) -> str:
    about = "" if answer.evidence.exact else "about "
    text = f"The network is {percent(answer.confidence)} sure."
    if answer.evidence.owned_share is not None:
        owned = percent(answer.evidence.owned_share)
        text += f" Filters owned by “{predicted}” give {about}{owned} of the evidence for it; the strongest:"
    else:
        text += f" The filters that speak most for “{predicted}”, and {about}how much of the evidence each gives:"
    return text


def _evidence(book: Book, answer: Answer, evidence: PathEvidence, name: str) -> Markup:
    items = [_item(book, answer.image, found) for found in evidence.filters if found.contribution > 0]
    if not items:
        return Markup("<p>No filter of this class speaks for it here.</p>")
    return render("evidence", label=f"Filters that speak for {name}", items=join(items))


def _item(book: Book, image: int, found: FilterEvidence) -> Markup:
    part = "evidence-item" if found.filter in book.filters else "evidence-item-plain"
    owner = int(book.findings.owners[found.filter])
    return render(
        part,
        tile=tile(book, image, found.filter, captioned=False),
        filter=found.filter,
        owner=f"({book.names[owner]})",
        bar=bar(found.share),
        share=percent(found.share),
    )


def classes_left_out(book: Book) -> Markup:
    """Which classes have no page, if any."""
    missing = book.findings.numbers.classes - len(book.classes)
    if not missing:
        return Markup("")
    return render(
        "note",
        text=f"Shown are the {len(book.classes)} classes with the most images; {count(missing, 'class', 'classes')} "
        "more are in the numbers, but have no page here.",
    )


def filters_left_out(book: Book) -> Markup:
    """Which filters have no page, if any."""
    missing = book.findings.numbers.filters - len(book.filters)
    if not missing:
        return Markup("")
    return render(
        "note",
        text=f"Shown are {count(len(book.filters), 'filter')}, of every shown class in turn the one that tells most "
        f"about it; {count(missing, 'filter')} more are in the numbers, but have no page here.",
    )


def serving_both(book: Book, one: int, other: int) -> list[int]:
    """The filters that serve two classes."""
    serves = book.findings.serves
    return [int(index) for index in (serves[one] & serves[other]).nonzero().flatten()]


def filter_links(book: Book, filters: list[int], most: int = 8) -> Markup:
    """Numbers of filters as links; of many the first ones."""
    if not filters:
        return Markup("none")
    links = join((link_filter(book, index) for index in filters[:most]), ", ")
    return Markup(links + (f" and {len(filters) - most} more" if len(filters) > most else ""))

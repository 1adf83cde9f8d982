"""The page of one class, and the page of one filter."""

from __future__ import annotations

from timm_csg.plots.report.book import Book
from timm_csg.plots.report.templates import Markup, element, fill, join, render
from timm_csg.plots.report.tiles import bar, cells, filter_links, link_class, prediction, serving_both, strip, tile
from timm_csg.plots.report.words import count, percent


def class_page(book: Book, label: int) -> Markup:
    """One class: its filters, whom it shares them with, its confusions, its answers."""
    findings, name = book.findings, book.names[label]
    owned = findings.filters_of(label)
    total = int(findings.confusion[label].sum())
    sentences = [
        f"{int(findings.confusion[label, label]):,} of {count(total, 'image')} are recognised "
        f"({percent(int(findings.confusion[label, label]) / total)})."
        if total
        else "None of the images is of this class."
    ]
    sentences.append(f"{count(len(owned), 'filter')} work{'s' if len(owned) == 1 else ''} for it.")
    if findings.ablation is not None and owned and total:
        after = findings.ablation.after
        others = [other for other in range(len(after)) if other != label]
        meanwhile = float(after[label, others].nanmean())
        sentences.append(
            f"With {'this filter' if len(owned) == 1 else 'these filters'} switched off, "
            f"{percent(float(after[label, label]))} are recognised, and {percent(meanwhile)} of the other classes."
        )
    shown = [index for index in owned if index in set(book.filters)]
    rows = [_filter_row(book, index, label) for index in shown[:12]]
    note = "Those that tell most about the class first, each with the images that drive it most."
    if len(owned) > len(rows):
        note += f" {count(len(owned) - len(rows), 'more filter')} of this class are not drawn here."
    if not owned:
        note = "No filter is owned by this class; it lives on filters of other classes."
    return render(
        "class",
        label=label,
        steps=_steps(book, "class", label),
        name=name,
        lead=" ".join(sentences),
        filters_note=note,
        filters=join(rows),
        shared=_shared(book, label),
        confused=_confused_with(book, label),
        predictions=join(prediction(book, answer) for answer in book.answers.values() if answer.label == label),
    )


def _filter_row(book: Book, index: int, label: int) -> Markup:
    findings = book.findings
    hits = int((findings.targets[findings.strongest[index]] == label).sum())
    mutual = float(findings.mutual[label, index])
    text = (
        f"Tells {mutual:.3f} nats about it, {percent(mutual / findings.numbers.mutual_information_bound)} of the most "
    )
    text += f"that is possible; {hits} of its {findings.strongest.shape[1]} strongest images are of this class."
    if findings.gate is not None:
        text = f"{findings.gate_name.capitalize()} {float(findings.gate[label, index]):.2f}. {text}"
    tiles = strip(tile(book, number, index) for number in book.strongest(index)[:5])
    return render("filter-row", filter=index, text=text, strip=tiles)


def _shared(book: Book, label: int) -> Markup:
    serves = book.findings.serves
    both = (serves & serves[label]).sum(dim=1)
    both[label] = 0
    partners = [int(other) for other in both.argsort(descending=True, stable=True)[:8] if int(both[other]) > 0]
    if not partners:
        return Markup("<p>None: every filter that serves it serves no other class.</p>")
    items = [
        fill("<li>“{name}”: {filters}</li>", name=link_class(book, other), filters=_shared_links(book, label, other))
        for other in partners
    ]
    return Markup(f"<ul>{join(items)}</ul>")


def _shared_links(book: Book, label: int, other: int) -> Markup:
    filters = serving_both(book, label, other)
    return fill("{noun} {links}", noun="filter" if len(filters) == 1 else "filters", links=filter_links(book, filters))


def _confused_with(book: Book, label: int) -> Markup:
    confusion = book.findings.confusion
    items = []
    for row, start, end in (
        (confusion[label], "taken for ", ""),
        (confusion[:, label], "images of ", f" were taken for “{book.names[label]}”"),
    ):
        order = [int(other) for other in row.argsort(descending=True, stable=True)[:6]]
        for other in order:
            if other != label and int(row[other]):
                items.append(
                    fill(
                        "<li>{images} {start}“{name}”{end}</li>",
                        images=count(int(row[other]), "image") if start == "taken for " else int(row[other]),
                        start=start,
                        name=link_class(book, other),
                        end=end,
                    )
                )
    return Markup(f"<ul>{join(items)}</ul>") if items else Markup("<p>With no other class, in either direction.</p>")


def filter_page(book: Book, index: int) -> Markup:
    """One filter: its strongest images, and what it has to do with each class."""
    findings = book.findings
    owner, measured = int(findings.owners[index]), int(findings.mutual[:, index].argmax())
    silent = bool(findings.silent[index])
    if silent:
        text = Markup("It gives the same response to every image, so it tells nothing.")
    elif findings.gate is None:
        text = fill("It tells most about “{owner}”, its owner in this report.", owner=link_class(book, owner))
    else:
        verdict = Markup("and it does tell most about that class")
        if owner != measured:
            verdict = fill("but it tells most about “{measured}”", measured=link_class(book, measured))
        text = fill(
            "Its owner is the class “{owner}” ({name} {gate}), {verdict}.",
            name=findings.gate_name,
            owner=link_class(book, owner),
            gate=f"{float(findings.gate[owner, index]):.2f}",
            verdict=verdict,
        )
    hits = int((findings.targets[findings.strongest[index]] == owner).sum())
    note = (
        f"{hits} of the {findings.strongest.shape[1]} strongest are of its owner. The same colour stands for the same "
        "response in all of them."
    )
    rows = _filter_rows(book, index)
    missing = findings.numbers.classes - len(rows)
    return render(
        "filter",
        filter=index,
        steps=_steps(book, "filter", index),
        lead=text,
        strongest_note="There are none." if silent else note,
        strip=strip(tile(book, number, index) for number in book.strongest(index)),
        gate_head=Markup("")
        if findings.gate is None
        else element("th", findings.gate_name.capitalize(), 'scope="col" class="num"'),
        rows=join(rows),
        left_out=render("note", text=f"The {len(rows)} strongest of {findings.numbers.classes} classes.")
        if missing
        else Markup(""),
    )


def _filter_rows(book: Book, index: int) -> list[Markup]:
    """What a filter has to do with each class, the strongest first."""
    findings = book.findings
    peak = findings.responses.nan_to_num().amax(dim=0)[index].clamp_min(1e-12)
    order = findings.mutual[:, index].argsort(descending=True, stable=True)
    order = order[findings.strength[order, index].argsort(descending=True, stable=True)]
    rows = []
    for label in order[:12].tolist():
        gate = [] if findings.gate is None else [float(findings.gate[label, index])]
        mutual, response = float(findings.mutual[label, index]), float(findings.responses[label, index])
        rows.append(
            cells(
                ("th", link_class(book, label)),
                *(("num", Markup(f"{value:.2f}{bar(value)}")) for value in gate),
                ("num", Markup(f"{mutual:.3f}{bar(mutual / findings.numbers.mutual_information_bound)}")),
                ("num", Markup(f"{response:.3g}{bar(response / float(peak))}") if response == response else "–"),
            )
        )
    return rows


def _steps(book: Book, kind: str, here: int) -> Markup:
    """Links to the page before, above and after."""
    everything = book.classes if kind == "class" else book.filters
    place = everything.index(here)
    before, after = everything[place - 1], everything[(place + 1) % len(everything)]

    def name(which: int) -> str:
        return book.names[which] if kind == "class" else f"Filter {which}"

    return render(
        "steps",
        what="Classes nearby" if kind == "class" else "Filters nearby",
        before=f"{kind}-{before}",
        before_name=name(before),
        up="classes" if kind == "class" else "filters",
        up_name="All classes" if kind == "class" else "All filters",
        after=f"{kind}-{after}",
        after_name=name(after),
    )

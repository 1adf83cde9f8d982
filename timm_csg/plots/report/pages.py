"""The pages of the whole report: overview, tables of classes and filters, gallery, and what it is about."""

from __future__ import annotations

from timm_csg.plots.report.book import Book
from timm_csg.plots.report.matrices import matrix_page
from timm_csg.plots.report.singles import class_page, filter_page
from timm_csg.plots.report.templates import Markup, element, fill, join, render
from timm_csg.plots.report.tiles import (
    bar,
    cells,
    classes_left_out,
    filter_links,
    filters_left_out,
    link_class,
    prediction,
    serving_both,
)
from timm_csg.plots.report.words import FEW_CLASSES, confusions, count, lead, measures, percent, takeaways


def all_pages(book: Book) -> Markup:
    """All pages in their order."""
    pages = [overview(book), classes_page(book), filters_page(book), matrix_page(book), images_page(book), about(book)]
    pages += [class_page(book, label) for label in book.classes]
    pages += [filter_page(book, index) for index in book.filters]
    return join(pages, "\n")


def overview(book: Book) -> Markup:
    """The first page: summary, how to read, classes at a glance."""
    findings, numbers = book.findings, book.findings.numbers
    chance = float(findings.confusion.sum(dim=1).max() / findings.confusion.sum())
    theirs = {} if book.reference is None else measures(book.reference[1], chance)
    shown = []
    for key, measure in measures(numbers, chance).items():
        other = theirs.get(key)
        shown.append(
            render(
                "measure",
                name=measure.name,
                value=measure.value,
                gauge=_gauge(measure.place, None if other is None else other.place),
                reference=Markup("")
                if book.reference is None or other is None
                else render("reference", name=book.reference[0], value=other.value),
                meaning=measure.meaning,
                good=measure.good,
            )
        )
    note = "Bars run from the smallest to the largest possible value; below each stands what is good."
    if book.reference is not None:
        note += f" The mark on a bar is the {book.reference[0]}, measured on the same images."
    if findings.gate is None:
        owner_head = "A filter's owner is the class it tells most about."
        owner_text = "This model was not trained to have owners, so most filters tell something about several classes."
    elif (numbers.gate_density or 0.0) * numbers.classes > FEW_CLASSES:
        owner_head = "A filter's owner is the class with its largest gate."
        owner_text = "In this model most gates stayed open for many classes, so owners and shares say little."
    elif findings.gate_name == "category":
        owner_head = "A filter has a category."
        owner_text = "Training assigned each filter to the class it responds to most, and asked it to stay on one part."
    else:
        owner_head = "A filter has an owner."
        owner_text = "Training gave each filter one class, or few, that it works for, and closed it for the others."
    return render(
        "overview",
        title=book.title,
        lead=lead(findings, book.architecture),
        takeaways=join(element("li", sentence) for sentence in takeaways(findings, book.names, book.reference)),
        numbers_note=note,
        measures=join(shown),
        filters=f"{numbers.filters:,}",
        owner_head=owner_head,
        owner_text=owner_text,
        cards=join(_card(book, label) for label in book.classes),
        left_out=classes_left_out(book),
    )


def _gauge(place: float, mark: float | None) -> Markup:
    drawn = Markup("") if mark is None else render("mark", place=f"{98.8 * max(0.0, min(1.0, mark)):.1f}")
    return render("gauge", fraction=f"{100 * max(0.0, min(1.0, place)):.1f}", mark=drawn)


def _card(book: Book, label: int) -> Markup:
    owned = book.findings.filters_of(label)
    images = [number for number, answer in book.answers.items() if answer.label == label and answer.is_right]
    images = images or [number for number, answer in book.answers.items() if answer.label == label]
    return render(
        "card",
        label=label,
        image=book.pictures.image(images[0]) if images else "none",
        name=book.names[label],
        accuracy=_accuracy(book, label),
        filters=count(len(owned), "filter"),
    )


def _accuracy(book: Book, label: int) -> str:
    row = book.findings.confusion[label]
    return f"{percent(float(row[label] / row.sum()))} right" if int(row.sum()) else "no images"


def classes_page(book: Book) -> Markup:
    """The table of classes, and the pairs that are confused."""
    findings = book.findings
    rows = []
    worst = findings.confusion.clone().fill_diagonal_(0)
    for label in book.classes:
        total, right = int(findings.confusion[label].sum()), int(findings.confusion[label, label])
        taken = int(worst[label].argmax())
        without = None if findings.ablation is None else float(findings.ablation.after[label, label])
        rows.append(
            cells(
                ("th", link_class(book, label)),
                ("num", f"{total:,}"),
                ("num", percent(right / total) if total else "–"),
                ("num", len(findings.filters_of(label))),
                ("num", "–" if without is None or without != without else percent(without)),
                ("", fill("{name} ({n})", name=link_class(book, taken), n=int(worst[label, taken])))
                if int(worst[label, taken])
                else ("", "–"),
            )
        )
    pairs = confusions(findings)
    shown = [pair for pair in pairs if pair[0] in set(book.classes)][:40]
    body = []
    for label, taken, images in shown:
        both = serving_both(book, label, taken)
        body.append(
            cells(
                ("th", link_class(book, label)),
                ("", link_class(book, taken)),
                ("num", images),
                ("num", percent(images / int(findings.confusion[label].sum()))),
                ("", filter_links(book, both)),
            )
        )
    if not pairs:
        note = "No image was given a wrong class."
    else:
        share = sum(1 for label, taken, _ in shown if serving_both(book, label, taken))
        note = (
            f"{'All' if len(shown) == len(pairs) else 'The most frequent'} {count(len(shown), 'pair')}; in {share} of "
            "them there is a filter that serves both classes, and so cannot tell them apart."
        )
    return render(
        "classes",
        rows=join(rows),
        confused_note=note,
        confused=render("confused", rows=join(body)) if body else Markup(""),
        left_out=classes_left_out(book),
    )


def filters_page(book: Book) -> Markup:
    """The table of filters."""
    findings = book.findings
    has_gate = findings.gate is not None
    measured = findings.mutual.argmax(dim=0)
    rows = []
    for index in book.filters:
        owner = int(findings.owners[index])
        also = [int(label) for label in findings.serves[:, index].nonzero().flatten() if int(label) != owner]
        silent = bool(findings.silent[index])
        mutual = float(findings.mutual[:, index].max())
        share = float((findings.targets[findings.strongest[index]] == owner).double().mean())
        rows.append(
            cells(
                ("th", Markup(f'<a href="#filter-{index}">{index}</a>')),
                ("", "always the same response" if silent else link_class(book, owner)),
                ("num", f"{float(findings.gate[owner, index]):.2f}" if findings.gate is not None else f"{mutual:.3f}"),
                ("", join((link_class(book, label) for label in also[:5]), ", ") if also else "–"),
                ("", "–" if silent else link_class(book, int(measured[index]))),
                ("num", Markup(f"{mutual:.3f}{bar(mutual / findings.numbers.mutual_information_bound)}")),
                ("num", "–" if silent else percent(share)),
            )
        )
    text = (
        "Every filter with its owner, the classes it also serves, and the class it was measured to tell most about."
        if has_gate
        else "Every filter with the class it tells most about: its owner in this report."
    )
    return render(
        "filters",
        lead=text,
        strength_name=findings.gate_name.capitalize() if has_gate else "Strength",
        rows=join(rows),
        left_out=filters_left_out(book),
    )


def images_page(book: Book) -> Markup:
    """The gallery of explained answers."""
    wrong = sum(not answer.is_right for answer in book.answers.values())
    text = (
        f"{count(len(book.answers), 'image')} and why each was given its class: {wrong} wrong answers and "
        f"{len(book.answers) - wrong} right ones, of every class those that the network was most certain of. The heat "
        "map over an image (Grad-CAM) shows where the evidence for the answer lies; the small pictures show what "
        "single filters saw in it."
    )
    return render(
        "images",
        lead=text,
        options=join(
            Markup(f'<option value="{label}">{fill("{name}", name=book.names[label])}</option>')
            for label in book.classes
        ),
        predictions=join(prediction(book, answer) for answer in book.answers.values()),
    )


def about(book: Book) -> Markup:
    """What was looked at, words, limits, sources."""
    findings, numbers = book.findings, book.findings.numbers
    stage = f"{findings.stage.name}, {count(numbers.filters, 'filter')}"
    if book.maps:
        height, width = next(iter(book.maps.values())).shape
        stage += f", maps of {height} by {width} places"
    facts = {
        "Model": book.architecture,
        "Last stage": stage,
        "Images": f"{numbers.images:,} of {count(numbers.classes, 'class', 'classes')}",
        "Owners by": "mutual information" if findings.gate is None else f"the trained {findings.gate_name}",
    }
    if book.reference is not None:
        facts["Compared with"] = f"{book.reference[0]}, {count(book.reference[1].filters, 'filter')}"
    left_out = Markup(classes_left_out(book) + filters_left_out(book)) or Markup(
        "<p>No class and no filter. Of the images, shown are those that drive a filter most, and explained ones.</p>"
    )
    if findings.ablation is None:
        text = "Switching off the filters of each class was not tried: it would take one pass for each class."
        left_out = Markup(left_out + render("note", text=text))
    if not book.maps:
        text = "There are no heat maps: the last stage of this model has no grid that could be laid over the image."
        left_out = Markup(left_out + render("note", text=text))
    return render(
        "about",
        facts=join(fill("<dt>{term}</dt><dd>{text}</dd>", term=term, text=text) for term, text in facts.items()),
        bound=f"{numbers.mutual_information_bound:.3f}",
        strength="mutual information" if findings.gate is None else findings.gate_name,
        left_out=left_out,
    )

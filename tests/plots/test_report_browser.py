"""The report in a real browser: no error, no request, sorting, pointing, keys, themes, sizes, paper, no script."""

import re

import pytest
from PIL import Image
from plots.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser, report_file):
    """The report, freshly opened in a window of 1280 pixels with the light theme."""
    browser.without_scripts(disabled=False)
    browser.resize(1280)
    browser.media(prefers_color_scheme="light")
    browser.open(report_file.as_uri())
    return browser


def shown(page):
    """Ids of the pages that can be seen."""
    return page.run("[...document.querySelectorAll('.page')].filter(p => p.offsetParent).map(p => p.id)")


def test_opens_without_error_or_request(page, report_file):
    for place in ("overview", "numbers", "classes", "filters", "matrix", "images", "about", "class-2", "filter-7"):
        page.go(f"#{place}")
        assert shown(page) == [place]
    assert page.complaints == []
    assert page.requests == [report_file.as_uri()]


def test_policy_stops_foreign_scripts_and_requests(page):
    blocked = page.run(
        """new Promise(done => {
            const stopped = [];
            document.addEventListener("securitypolicyviolation", event => stopped.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.attacked = true";
            document.body.append(script);
            const image = new Image();
            image.src = "http://127.0.0.1:9/x.png";
            fetch("http://127.0.0.1:9/").catch(() => 0);
            setTimeout(() => done([window.attacked === undefined, ...stopped.sort()]), 200);
        })"""
    )
    assert blocked == [True, "connect-src", "img-src", "script-src-elem"]


def test_name_of_a_class_is_text_and_not_a_script(page):
    page.go("#class-2")
    assert page.run("document.querySelector('#class-2 h1').textContent") == "Class “<script>alert('blue')</script>”"
    assert page.run("document.title").startswith("Class “<script>alert")


def test_links_lead_to_pages_and_move_the_focus(page):
    page.run("document.querySelector('#overview .card').click()")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert shown(page) == ["class-0"]
    assert page.run("document.activeElement.id") == "class-0-title"
    page.run("history.back()")
    page.run("new Promise(done => setTimeout(done, 100))")
    assert shown(page) == ["overview"]
    page.go("#nowhere")
    assert shown(page) == ["overview"]


def test_tables_sort_by_every_column_and_say_so(page):
    page.go("#filters")
    column = "[...document.querySelectorAll('#filter-table tbody tr')].map(row => parseFloat(row.cells[5].textContent))"
    head = "document.querySelectorAll('#filter-table thead th')[5]"
    page.run(f"{head}.querySelector('button').click()")
    cells = page.run(column)
    values = [value for value in cells if value is not None]
    assert cells == sorted(values, reverse=True) + [None] * (len(cells) - len(values))  # a silent filter has none
    assert page.run(f"{head}.getAttribute('aria-sort')") == "descending"
    page.run(f"{head}.querySelector('button').click()")
    assert page.run(column) == [None] * (len(cells) - len(values)) + sorted(values)


@pytest.mark.parametrize(("place", "box", "table"), [("filters", "find", "filter"), ("classes", "find-class", "class")])
def test_search_leaves_the_rows_that_hold_the_words(page, place, box, table):
    page.go(f"#{place}")
    rows, said = page.run(
        f"""(() => {{
            const input = document.querySelector("#{box}");
            input.value = "green";
            input.dispatchEvent(new Event("input"));
            const rows = [...document.querySelectorAll("#{table}-table tbody tr")].filter(row => !row.hidden)
                .map(row => row.textContent.includes("green"));
            return [rows, document.querySelector("output[for={box}]").textContent];
        }})()"""
    )
    assert rows
    assert all(rows)
    assert said == f"{len(rows)} of {24 if table == 'filter' else 4}"


def test_both_matrices_show_the_filters_in_one_order(page):
    page.go("#matrix")
    order = [[text.split(",")[0] for text in first_columns(page, key)] for key in ("gate", "mutual")]
    assert order[0] == order[1]


def test_overview_fits_one_screen_and_one_sheet(page, tmp_path):
    assert page.run("document.querySelector('#overview').getBoundingClientRect().bottom") < 900
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(tmp_path / "summary.pdf").read_bytes())) == 1


def test_numbers_are_explained_one_step_from_the_overview(page):
    page.run("document.querySelector('#overview .legend a').click()")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert shown(page) == ["numbers"]
    names = "[...document.querySelectorAll('%s')].map(part => part.textContent)"
    assert page.run(names % "#numbers h2") == page.run(names % "#overview .brief span")
    assert page.run("document.querySelector('.top [aria-current]').textContent") == "Overview"


def test_printing_prints_the_overview_and_the_open_page(page):
    page.go("#filter-7")
    page.media(media="print", prefers_color_scheme="light")
    assert shown(page) == ["overview", "filter-7"]


def test_printing_without_scripts_prints_the_overview(page, report_file):
    page.without_scripts()
    page.open(report_file.as_uri())
    page.without_scripts(disabled=False)
    page.media(media="print", prefers_color_scheme="light")
    assert shown(page) == ["overview"]


def first_columns(page, key="gate"):
    """The filters on the left of a matrix, as the arrow keys find them."""
    page.run(f"document.querySelector('[data-matrix={key}] .window').focus()")
    found = []
    for _ in range(4):
        found.append(page.run(f"document.querySelector('[data-matrix={key}] .readout').textContent"))
        page.key("ArrowRight")
    return found


def test_arrow_keys_read_the_matrix_and_enter_opens_the_filter(page, trained):
    page.go("#matrix")
    page.run("(() => { const s = document.querySelector('.sort-filters'); s.value = 'number';"
             " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    gate = trained[0].mechanism.class_filter_matrix()
    names = ["red", "green"]
    assert first_columns(page) == [
        f"Filter {index}, class red, gate {float(gate[0, index]):.2f}, owner: "
        + page.run(f"JSON.parse(document.querySelector('#data').textContent).filters[{index}].owner")
        for index in range(4)
    ]
    page.key("ArrowDown")
    assert f"class {names[1]}" in page.run("document.querySelector('[data-matrix=gate] .readout').textContent")
    page.key("Enter")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert shown(page) == ["filter-4"]


def test_matrix_sorts_by_class_strength_and_number(page):
    page.go("#matrix")
    page.run("document.querySelectorAll('[data-matrix=mutual] .labels button')[1].click()")
    values = [float(text.split(", ")[2].split()[0]) for text in first_columns(page, "mutual") if "class red" in text]
    assert len(values) == 4
    assert page.run("document.querySelector('[data-matrix=mutual] .sort-filters').value") == "1"
    page.key("ArrowDown")
    page.run("document.querySelectorAll('[data-matrix=mutual] .labels button')[0].click()")
    values = [float(text.split(", ")[2].split()[0]) for text in first_columns(page, "mutual")]
    assert values == sorted(values, reverse=True)


def test_pointing_names_class_filter_and_value(page):
    page.go("#matrix")
    page.run("window.scrollTo(0, 0)")
    box = page.run("(({x, y}) => [x, y])(document.querySelector('[data-matrix=gate] canvas').getBoundingClientRect())")
    page.point(box[0] + 5, box[1] + 5)
    words = page.run("document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').textContent")
    assert words.startswith("Filter ")
    assert ", class red\ngate 1.00\nowner: red" in words
    page.point(box[0] + 5, box[1] + 5, click=True)
    page.run("new Promise(done => setTimeout(done, 50))")
    assert shown(page)[0].startswith("filter-")


def test_gallery_shows_wrong_answers_only_on_request(page):
    page.go("#images")
    counts = page.run(
        """(() => {
            const choice = document.querySelector("#verdict");
            const seen = () => [...document.querySelectorAll("#images .prediction")].filter(card => card.offsetParent);
            const all = seen().length;
            choice.value = "right";
            choice.dispatchEvent(new Event("change"));
            return [all, seen().length, seen().every(card => card.dataset.verdict === "right")];
        })()"""
    )
    assert counts[0] >= counts[1] > 0
    assert counts[2]


@pytest.mark.parametrize("preferred", ["light", "dark"])
def test_theme_follows_the_system_and_the_button(page, report_file, preferred):
    page.media(prefers_color_scheme=preferred)
    page.open(report_file.as_uri())
    back = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(19, 20, 29)"
    assert page.run(back) == (light if preferred == "light" else dark)
    page.run("document.querySelector('#theme').click()")
    assert page.run(back) == (dark if preferred == "light" else light)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_background(page, theme):
    page.media(prefers_color_scheme=theme)
    names = ["--text", "--soft", "--accent", "--right", "--wrong"]
    backs = {"--right": "--right-back", "--wrong": "--wrong-back"}
    for name in names:
        for back in {backs.get(name, "--back"), "--back"}:
            colours = page.run(
                f"['{name}', '{back}'].map(n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
            )
            assert contrast(*colours) >= 4.5, (name, back)


def contrast(one, other):
    """WCAG's ratio of two colours such as "#ffffff"."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [1280, 400])
def test_no_page_is_wider_than_the_window(page, width, tmp_path):
    page.resize(width, 800)
    page.run("document.querySelectorAll('select').forEach(s => s.add(new Option('as long as a row '.repeat(8))))")
    for place in ("overview", "numbers", "classes", "filters", "matrix", "images", "about", "class-2", "filter-7"):
        page.go(f"#{place}")
        assert page.run("document.documentElement.scrollWidth") <= width, place
    picture = Image.open(page.screenshot(tmp_path / "page.png"))
    assert picture.width == width
    assert len(picture.convert("L").getcolors(256)) > 10


def test_heat_maps_can_be_switched_off(page):
    page.go("#filter-7")
    state = "getComputedStyle(document.querySelector('#filter-7 .h')).visibility"
    assert page.run(state) == "visible"
    page.run("document.querySelector('#heat').click()")
    assert page.run(state) == "hidden"


def test_all_pages_can_be_shown_at_once_and_printed(page, tmp_path):
    one = page.pdf(tmp_path / "one.pdf").stat().st_size
    page.run("document.querySelector('#all').click()")
    assert len(shown(page)) == 8 + 4 + 24
    assert page.pdf(tmp_path / "all.pdf").stat().st_size > 2 * one


def test_paper_is_white_also_from_the_dark_theme(page):
    page.run("document.querySelector('#theme').click()")
    page.media(media="print", prefers_color_scheme="dark")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('.tools')).display") == "none"


def test_keyboard_reaches_content_and_skips_the_navigation(page):
    page.key("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.key("Enter")
    assert page.run("document.activeElement.id") == "main"


def test_motion_is_still_where_that_is_preferred(page):
    page.media(prefers_reduced_motion="reduce")
    assert page.run("getComputedStyle(document.querySelector('.card')).transitionDuration") == "0s"


def test_everything_is_visible_without_scripts(page, report_file):
    page.without_scripts()
    page.open(report_file.as_uri())
    page.without_scripts(disabled=False)  # to look at what was made without
    assert page.run("document.documentElement.className") == ""
    assert len(shown(page)) == 8 + 4 + 24
    assert page.run("[...document.querySelectorAll('.needs-js')].every(part => !part.offsetParent)")
    assert page.run("document.querySelector('.still').naturalWidth") == 24

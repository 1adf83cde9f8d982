"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;
  const facts = JSON.parse($("#data").textContent);
  const tip = $("#tip");
  const redraws = [];
  const redraw = () => redraws.forEach((draw) => draw());

  // Pages: one is shown, named by the address; a place inside a page shows that page.
  const pages = $$(".page");
  const title = document.title;
  function show(moveFocus) {
    const wanted = document.getElementById(decodeURIComponent(location.hash.slice(1))) || pages[0];
    const page = wanted.closest(".page") || pages[0];
    pages.forEach((other) => other.classList.toggle("current", other === page));
    const heading = $("h1", page);
    document.title = page === pages[0] ? title : `${heading.textContent} · ${title}`;
    const kind = page.id.replace(/-.*/, "");
    const above = { class: "classes", filter: "filters", numbers: "overview" }[kind] || page.id;
    $$(".top nav a").forEach((link) => {
      if (link.hash === `#${above}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    tip.hidden = true;
    redraw();
    if (!moveFocus) return;
    if (wanted === page) {
      heading.focus({ preventScroll: true });
      if (root.classList.contains("show-all")) page.scrollIntoView();
      else window.scrollTo(0, 0);
    } else wanted.scrollIntoView();
  }
  window.addEventListener("hashchange", () => show(true));
  // A browser that opens the address of a page scrolls to it, which takes the menu away where that is not kept in sight.
  window.addEventListener("load", () => requestAnimationFrame(() => {
    const wanted = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (wanted && wanted.matches(".page") && !root.classList.contains("show-all")) window.scrollTo(0, 0);
  }));
  $(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("#main").focus();
  });

  // The three switches.
  $("#heat").addEventListener("click", (event) => {
    const hidden = root.classList.toggle("no-heat");
    event.currentTarget.setAttribute("aria-pressed", String(!hidden));
  });
  $("#all").addEventListener("click", (event) => {
    const all = root.classList.toggle("show-all");
    event.currentTarget.setAttribute("aria-pressed", String(all));
    redraw();
  });
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  function nameTheme() {
    $("#theme").textContent = isDark() ? "Light theme" : "Dark theme";
    redraw();
  }
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  window.addEventListener("resize", redraw);
  window.addEventListener("beforeprint", redraw);
  window.addEventListener("afterprint", redraw);

  // Tables: a button in every head sorts by its column.
  const valueOf = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, ""));
    return Number.isNaN(number) || !/^[-\d]/.test(text) ? text : number;
  };
  const compare = (one, other) => {
    const numbers = typeof one === "number" && typeof other === "number";
    if (!numbers && typeof one !== typeof other) return typeof one === "number" ? 1 : -1;
    return numbers ? one - other : one.localeCompare(other, undefined, { numeric: true });
  };
  $$("table.sortable").forEach((table) => {
    const heads = $$("thead th", table);
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const was = head.getAttribute("aria-sort");
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const order = was === "none" ? first : was === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const keyed = [...body.rows].map((row, place) => ({ row, place, value: valueOf(row, column) }));
        keyed.sort((a, b) => sign * compare(a.value, b.value) || a.place - b.place);
        body.append(...keyed.map((entry) => entry.row));
      });
    });
  });
  $$("input[data-table]").forEach((input) => {
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
      rows.forEach((row) => (row.hidden = !row.textContent.toLowerCase().includes(wanted)));
      $("output", input.closest("p")).textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    });
  });

  // The gallery.
  const verdict = $("#verdict");
  const ofClass = $("#of-class");
  function filterGallery() {
    let shown = 0;
    const all = $$("#images .prediction");
    all.forEach((card) => {
      card.hidden =
        (verdict.value && card.dataset.verdict !== verdict.value) || (ofClass.value && card.dataset.class !== ofClass.value);
      shown += card.hidden ? 0 : 1;
    });
    $("#found").textContent = `${shown} of ${all.length}`;
  }
  verdict.addEventListener("change", filterGallery);
  ofClass.addEventListener("change", filterGallery);
  filterGallery();

  // The pictures of the matrices.
  const range = (count) => [...Array(count).keys()];
  $$(".matrix").forEach((section) => {
    const { values, top, unit, places } = facts.matrices[section.dataset.matrix];
    const { classes, filters, order } = facts;
    const canvas = $("canvas", section);
    const pane = $(".window", section);
    const labels = $(".labels", section);
    const cursor = $(".cursor", section);
    const readout = $(".readout", section);
    const sortFilters = $(".sort-filters", section);
    const sortClasses = $(".sort-classes", section);
    const peak = filters.map((_, column) => Math.max(...values.map((row) => row[column])));
    let rows = [];
    let columns = [];
    let cell = { width: 1, height: 1 };
    let here = null;

    const buttons = classes.map((label, row) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label.name;
      button.title = `${label.name}: sort the filters by it`;
      button.addEventListener("click", () => {
        sortFilters.value = String(row);
        arrange();
      });
      return button;
    });

    function arrange() {
      const by = sortClasses.value;
      rows = range(classes.length);
      if (by === "name") {
        rows.sort((a, b) => classes[a].name.localeCompare(classes[b].name, undefined, { numeric: true }) || a - b);
      } else if (by === "filters") rows.sort((a, b) => classes[b].own - classes[a].own || a - b);
      const rank = [];
      rows.forEach((row, place) => (rank[row] = place));
      const how = sortFilters.value;
      columns = how === "owner" ? [...order] : range(filters.length);
      const rankOf = (column) => rank[filters[column].row] ?? classes.length;
      if (how === "owner") columns.sort((a, b) => rankOf(a) - rankOf(b));
      else if (how === "strength") columns.sort((a, b) => peak[b] - peak[a] || a - b);
      else if (how !== "number") columns.sort((a, b) => values[Number(how)][b] - values[Number(how)][a] || a - b);
      buttons.forEach((button, row) => button.setAttribute("aria-pressed", String(how === String(row))));
      labels.replaceChildren(...rows.map((row) => buttons[row]));
      if (here) here = null;
      cursor.hidden = true;
      draw();
    }

    function draw() {
      if (!section.offsetParent) return;
      const height = classes.length > 40 ? 13 : 20;
      buttons.forEach((button) => {
        button.style.height = `${height}px`;
        button.style.fontSize = `${Math.min(14, height - 2)}px`;
      });
      const room = pane.clientWidth;
      if (!room) return;
      const width = Math.max(3, room / filters.length);
      cell = { width, height };
      const sharpness = window.devicePixelRatio || 1;
      canvas.width = Math.round(width * filters.length * sharpness);
      canvas.height = cell.height * classes.length * sharpness;
      canvas.style.width = `${width * filters.length}px`;
      canvas.style.height = `${cell.height * classes.length}px`;
      const context = canvas.getContext("2d");
      context.scale(sharpness, sharpness);
      const colour = getComputedStyle(root).getPropertyValue("--cell").trim();
      const gap = width > 5 ? 1 : 0;
      rows.forEach((row, y) => {
        columns.forEach((column, x) => {
          const strength = values[row][column] / top;
          if (strength < 0.004) return;
          context.fillStyle = `rgba(${colour}, ${Math.min(1, strength).toFixed(3)})`;
          const left = Math.round(x * width);
          context.fillRect(left, y * cell.height, Math.round((x + 1) * width) - left - gap, cell.height - 1);
        });
      });
      if (here) mark();
    }

    function words(x, y) {
      const filter = filters[columns[x]];
      const label = classes[rows[y]];
      const value = values[rows[y]][columns[x]].toFixed(places);
      return [`Filter ${filter.id}, class ${label.name}`, `${unit === "gate" ? "gate " : ""}${value}${unit === "nats" ? " nats" : ""}`, `owner: ${filter.owner}`];
    }
    function mark() {
      cursor.hidden = false;
      cursor.style.left = `${here.x * cell.width - 2}px`;
      cursor.style.top = `${here.y * cell.height - 2}px`;
      cursor.style.width = `${cell.width + 4}px`;
      cursor.style.height = `${cell.height + 4}px`;
    }
    function go(x, y) {
      here = { x: Math.max(0, Math.min(filters.length - 1, x)), y: Math.max(0, Math.min(classes.length - 1, y)) };
      mark();
      readout.textContent = words(here.x, here.y).join(", ");
    }
    const open = () => (location.hash = `#filter-${filters[columns[here.x]].id}`);
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [Math.floor((event.clientX - box.left) / cell.width), Math.floor((event.clientY - box.top) / cell.height)];
    };
    canvas.addEventListener("pointermove", (event) => {
      go(...at(event));
      tip.textContent = words(here.x, here.y).join("\n");
      tip.hidden = false;
      const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
      const below = event.clientY + 16;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : below}px`;
    });
    canvas.addEventListener("pointerleave", () => (tip.hidden = true));
    canvas.addEventListener("click", (event) => {
      go(...at(event));
      open();
    });
    pane.addEventListener("focus", () => here || go(0, 0));
    pane.addEventListener("keydown", (event) => {
      const { x, y } = here || { x: 0, y: 0 };
      const moves = {
        ArrowLeft: [x - 1, y], ArrowRight: [x + 1, y], ArrowUp: [x, y - 1], ArrowDown: [x, y + 1],
        Home: [0, y], End: [filters.length - 1, y], PageUp: [x, 0], PageDown: [x, classes.length - 1],
      };
      if (event.key === "Enter" && here) open();
      else if (moves[event.key]) {
        event.preventDefault();
        go(...moves[event.key]);
        const left = here.x * cell.width;
        if (left < pane.scrollLeft) pane.scrollLeft = left;
        if (left + cell.width > pane.scrollLeft + pane.clientWidth) pane.scrollLeft = left + cell.width - pane.clientWidth;
      }
    });
    sortFilters.addEventListener("change", arrange);
    sortClasses.addEventListener("change", arrange);
    arrange();
    redraws.push(draw);
  });

  nameTheme();
  show(location.hash.length > 1);
})();

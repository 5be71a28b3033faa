"use strict";
(function () {
  const view = JSON.parse(document.getElementById("view").textContent);
  const root = document.documentElement;
  const shown = {}; // option of each chart
  let selected = view.selected;

  // Theme: the system's, unless somebody chose ----------------------------------------------------
  const phone = window.matchMedia("(max-width: 640px)");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  }

  function remember(value) {
    try {
      if (value) localStorage.setItem("compressor-theme", value);
      return localStorage.getItem("compressor-theme");
    } catch (error) { // a page without storage keeps no choice
      return null;
    }
  }

  function followTheme() {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Show in light colours" : "Show in dark colours");
    button.setAttribute("aria-pressed", String(isDark()));
    drawAll();
    root.dataset.drawn = isDark() ? "dark" : "light";
  }

  // Charts ----------------------------------------------------------------------------------------
  function coloured(value, style) {
    if (typeof value === "string" && /^@[a-z-]+$/.test(value)) {
      return style.getPropertyValue("--" + value.slice(1)).trim();
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, style)]));
    }
    return value;
  }

  function themed(figure, style) {
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const narrow = phone.matches;
    const axis = {
      gridcolor: colour("border"), zerolinecolor: colour("border"), linecolor: colour("border"),
      automargin: true, fixedrange: narrow,
    };
    const layout = figure.layout;
    return Object.assign({}, layout, {
      paper_bgcolor: colour("card"), plot_bgcolor: colour("card"),
      font: { color: colour("text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      hoverlabel: {
        bgcolor: colour("card"), bordercolor: colour("border"), align: "left",
        font: { color: colour("text"), size: 13 },
      },
      margin: { l: 10, r: 10, t: layout.showlegend ? 46 : 24, b: 10 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "closest", dragmode: narrow ? false : "zoom",
      height: narrow && !layout.yaxis.ticktext ? 340 : layout.height, // rows need their height
      xaxis: Object.assign({}, axis, layout.xaxis),
      yaxis: Object.assign({}, axis, layout.yaxis),
    });
  }

  function draw(key) {
    const chart = view.charts[key];
    const place = document.getElementById("chart-" + key);
    if (!chart || !place) return;
    const option = shown[key] || Object.keys(chart.figures)[0];
    const style = getComputedStyle(root);
    const figure = coloured(chart.figures[option], style);
    place.setAttribute("aria-label", chart.summaries[option]);
    const config = { responsive: true, displayModeBar: false, displaylogo: false };
    Plotly.react(place, figure.data, themed(figure, style), config);
    mark(place);
    if (!place.dataset.listens) {
      place.dataset.listens = "true";
      place.on("plotly_click", (event) => {
        const id = event.points[0].customdata;
        if (typeof id === "string") select(id);
      });
    }
  }

  function mark(place) { // the ring around the variant that is selected
    const index = place.data.findIndex((trace) => trace.name === "selected");
    if (index < 0) return;
    let x = [], y = [];
    for (const trace of place.data) {
      const found = (trace.customdata || []).indexOf(selected);
      if (found >= 0) { x = [trace.x[found]]; y = [trace.y[found]]; }
    }
    Plotly.restyle(place, { x: [x], y: [y] }, [index]);
  }

  function drawAll() {
    Object.keys(view.charts).forEach(draw);
  }

  document.querySelectorAll("button[data-chart]").forEach((each) => {
    each.addEventListener("click", () => {
      shown[each.dataset.chart] = each.dataset.option;
      each.parentElement.querySelectorAll("button").forEach((other) => {
        other.setAttribute("aria-pressed", String(other === each));
      });
      draw(each.dataset.chart);
    });
  });

  // Variants --------------------------------------------------------------------------------------
  function cell(name, text) {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  }

  function select(id) {
    const variant = view.variants[id];
    if (!variant) return;
    selected = id;
    document.getElementById("plan-title").textContent = variant.title;
    document.getElementById("plan-verdict").textContent = variant.verdict;
    document.getElementById("plan-facts").replaceChildren(...variant.facts.map(([name, value]) => {
      const pair = document.createElement("div");
      pair.append(cell("dt", name), cell("dd", value));
      return pair;
    }));
    const rows = variant.plan.length ? variant.plan : [["nothing", "", "the reference as it is"]];
    document.querySelector("#plan-table tbody").replaceChildren(...rows.map((row) => {
      const made = document.createElement("tr");
      made.append(...row.map((text) => cell("td", text)));
      return made;
    }));
    document.querySelectorAll("#table tbody tr").forEach((row) => {
      const isIt = row.dataset.variant === id;
      if (isIt) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
      row.querySelector("button").setAttribute("aria-pressed", String(isIt));
    });
    const place = document.getElementById("chart-frontier");
    if (place && place.data) mark(place);
  }

  document.querySelectorAll("#table tbody tr").forEach((row) => {
    row.addEventListener("click", () => select(row.dataset.variant));
  });

  function compare(a, b) { // numbers by value, words by letters, what is missing last
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  }

  document.querySelectorAll("button[data-sort]").forEach((each) => {
    each.addEventListener("click", () => {
      const head = each.closest("th");
      const falls = head.getAttribute("aria-sort") === "ascending";
      head.parentElement.querySelectorAll("th").forEach((th) => th.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const body = document.querySelector("#table tbody");
      const value = (row) => row.children[Number(each.dataset.sort)].dataset.value;
      const rows = Array.from(body.rows).sort((a, b) => {
        const missing = (value(a) === "") !== (value(b) === "");
        const order = compare(value(a), value(b));
        return falls && !missing ? -order : order;
      });
      body.append(...rows);
    });
  });

  // Begin -----------------------------------------------------------------------------------------
  const kept = remember();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    followTheme();
  });
  system.addEventListener("change", followTheme);
  phone.addEventListener("change", drawAll);
  select(selected);
  followTheme();
  root.dataset.ready = "true";
})();

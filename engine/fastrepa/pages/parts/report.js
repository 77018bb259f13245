"use strict";
const report = (() => {
  const read = (page) => JSON.parse(page.getElementById("data").textContent);
  let data = read(document);
  const svgSpace = "http://www.w3.org/2000/svg";
  const dashes = ["", "7 4", "2 3", "10 3 2 3", "14 4", "5 2", "2 5", "9 2 2 2 2 2"];
  const margin = { right: 12, top: 10, bottom: 26 }; // left: as wide as the labels there

  const short = (v) => {
    const size = Math.abs(v);
    if (size && (size < 1e-3 || size >= 1e7)) return v.toExponential(2).replace("e+", "e");
    return Number(v.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 8 });
  };
  const duration = (s) =>
    s < 120 ? `${short(s)} s` : s < 7200 ? `${short(s / 60)} min` : `${short(s / 3600)} h`;
  const axis = () => document.querySelector("input[name=axis]:checked").value;
  const isShown = (run) => document.querySelector(`input[name=shown][value="${run}"]`).checked;

  function element(name, attributes, parent) {
    const made = document.createElementNS(svgSpace, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent?.append(made);
    return made;
  }

  // Curves ---------------------------------------------------------------------------------------

  const quantile = (sorted, q) => sorted[Math.round(q * (sorted.length - 1))];

  /* The first values of a run may tower over the rest: they do not choose the scale. */
  function range(curves, log) {
    const ends = [];
    for (const curve of curves) {
      const values = [...curve.value].sort((a, b) => a - b);
      const settled = curve.mean.slice(Math.floor(curve.mean.length / 50));
      if (values.length) {
        ends.push(quantile(values, 0.01), quantile(values, 0.99), Math.min(...settled), Math.max(...settled));
      }
    }
    let [low, high] = [Math.min(...ends), Math.max(...ends)];
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const pad = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - pad, high + pad];
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  /* Decades with what lies between them; where there are too few of these, as on a plain scale. */
  function logTicks(low, high) {
    for (const factors of [[1], [1, 3], [1, 2, 5]]) {
      const found = [];
      for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
        for (const factor of factors) {
          const place = power + Math.log10(factor);
          if (place >= low && place <= high) found.push(place);
        }
      }
      if (found.length >= 3) return found.filter((_, i) => i % Math.ceil(found.length / 7) === 0);
    }
    return ticks(10 ** low, 10 ** high, 4).filter((v) => v > 0).map(Math.log10);
  }

  function draw(figure) {
    const svg = figure.querySelector("svg");
    const key = figure.dataset.key;
    const all = data.curves[key];
    const logBox = figure.querySelector("input[name=log]");
    logBox.disabled = !all.some((c) => c.value.length) || all.some((c) => c.value.some((v) => v <= 0));
    const log = logBox.checked && !logBox.disabled;
    const along = axis();
    const curves = all.filter((c) => isShown(c.run));
    const [width, height] = [svg.clientWidth, svg.clientHeight];
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const points = curves.filter((c) => c.value.length);
    if (!points.length || width < 80) {
      element("text", { x: 16, y: 32 }, svg).textContent = "nothing to show";
      figure.drawn = null;
      describe(figure, []);
      return;
    }
    const xs = points.flatMap((c) => c[along]).filter((x) => x !== null);
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    if (left === right) [left, right] = [left - 1, right + 1];
    const [low, high] = range(points, log);
    const levels = log ? logTicks(low, high) : ticks(low, high, 4);
    const labels = levels.map((level) => short(log ? 10 ** level : level));
    const edge = 14 + 7 * Math.max(...labels.map((label) => label.length));
    const x = (v) => edge + ((v - left) / (right - left)) * (width - edge - margin.right);
    const y = (v) =>
      height - margin.bottom - (((log ? Math.log10(v) : v) - low) / (high - low)) * (height - margin.top - margin.bottom);

    levels.forEach((level, i) => {
      const at = y(log ? 10 ** level : level);
      element("line", { class: "rule", x1: edge, x2: width - margin.right, y1: at, y2: at }, svg);
      element("text", { x: edge - 6, y: at + 4, "text-anchor": "end" }, svg).textContent = labels[i];
    });
    const unit = along === "step" ? 1 : right < 120 ? 1 : right < 7200 ? 60 : 3600;
    const unitName = along === "step" ? "" : { 1: " s", 60: " min", 3600: " h" }[unit];
    const places = ticks(left / unit, right / unit, Math.max(3, Math.floor(width / 80)));
    places.forEach((place, i) => {
      const anchor = x(place * unit) > width - 30 ? "end" : "middle";
      const label = short(place) + (i === places.length - 1 ? unitName || " steps" : "");
      element("text", { x: anchor === "end" ? width : x(place * unit), y: height - 6, "text-anchor": anchor }, svg).textContent = label;
    });

    const clip = element("clipPath", { id: `clip-${key}` }, svg);
    element("rect", { x: edge, y: margin.top - 4, width: width - edge - margin.right + 4,
      height: height - margin.top - margin.bottom + 4 }, clip);
    const plot = element("g", { "clip-path": `url(#clip-${key})` }, svg);
    const path = (curve, values) =>
      values.map((v, i) => (curve[along][i] === null ? "" : `${x(curve[along][i]).toFixed(1)},${y(v).toFixed(1)}`))
        .filter(Boolean).join("L");
    for (const curve of points) {
      const group = element("g", { class: `run-${curve.run}` }, plot);
      element("path", { class: "raw", d: `M${path(curve, curve.value)}` }, group);
      element("path", { d: `M${path(curve, curve.mean)}`, "stroke-dasharray": dashes[curve.run] }, group);
      if (curve.value.length < 30) {
        curve.value.forEach((v, i) => {
          if (curve[along][i] !== null)
            element("circle", { cx: x(curve[along][i]), cy: y(v), r: 3, fill: "currentColor" }, group);
        });
      }
    }
    if (along === "step") {
      for (const step of curves.flatMap((c) => c.bad).slice(0, 1000)) {
        element("line", { class: "bad", x1: x(step), x2: x(step), y1: height - margin.bottom - 8, y2: height - margin.bottom }, plot);
      }
    }
    const cursor = element("g", { visibility: "hidden" }, svg);
    figure.drawn = { points, along, x, y, edge, width, left, right, cursor, height };
    describe(figure, points);
  }

  /* Without a cursor: every run's last value, which is also what a screen reader gets. */
  function describe(figure, points) {
    const last = points.map((c) => [c.run, c.mean.at(-1)]);
    show(figure, "last", last);
    const title = figure.querySelector("h4").textContent;
    const text = last.map(([run, value]) => `${data.runs[run]} ${short(value)}`).join(", ");
    figure.querySelector("svg").setAttribute("aria-label", `${title}, last: ${text || "nothing"}`);
  }

  function show(figure, where, values) {
    const line = figure.querySelector(".values");
    line.replaceChildren();
    if (!values.length) return;
    const first = document.createElement("span");
    first.textContent = where;
    line.append(first);
    for (const [run, value] of values) {
      const item = document.createElement("span");
      const swatch = document.createElement("span");
      swatch.className = `run run-${run}`;
      swatch.setAttribute("aria-hidden", "true");
      item.append(swatch, `${data.runs[run]} ${short(value)}`);
      line.append(item);
    }
  }

  const nearest = (list, v) =>
    list.reduce((best, x, i) => (x !== null && Math.abs(x - v) < Math.abs((list[best] ?? Infinity) - v) ? i : best), 0);

  /* Values at `where` (a step, or seconds): each run's nearest point, its own mean. */
  function pointAt(figure, where) {
    const { points, along, x, y, cursor, height } = figure.drawn;
    const leader = points[0];
    const place = points.map((c) => c[along][nearest(c[along], where)])
      .reduce((a, b) => (Math.abs(b - where) < Math.abs(a - where) ? b : a), leader[along][nearest(leader[along], where)]);
    cursor.replaceChildren();
    element("line", { class: "cursor", x1: x(place), x2: x(place), y1: margin.top, y2: height - margin.bottom }, cursor);
    const values = points
      .filter((c) => place >= c[along][0] && place <= c[along].at(-1))
      .map((c) => {
        const i = nearest(c[along], place);
        element("circle", { class: `run-${c.run}`, cx: x(c[along][i]), cy: y(c.mean[i]), r: 4.5, fill: "currentColor" }, cursor);
        return [c.run, c.mean[i]];
      });
    cursor.setAttribute("visibility", "visible");
    figure.at = place;
    show(figure, along === "step" ? `step ${Math.round(place).toLocaleString("en")}` : duration(place), values);
  }

  function leave(figure) {
    if (!figure.drawn) return;
    figure.at = null;
    figure.drawn.cursor.setAttribute("visibility", "hidden");
    describe(figure, figure.drawn.points);
  }

  function onKey(figure, event) {
    if (!figure.drawn) return;
    const { points, along } = figure.drawn;
    const stops = [...new Set(points.flatMap((c) => c[along]))].filter((v) => v !== null).sort((a, b) => a - b);
    const now = figure.at === null || figure.at === undefined ? stops.length : nearest(stops, figure.at);
    const jump = Math.max(1, Math.round(stops.length / 20));
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - jump, PageDown: now + jump,
      Home: 0, End: stops.length - 1 }[event.key];
    if (event.key === "Escape") leave(figure);
    if (to === undefined) return;
    event.preventDefault();
    pointAt(figure, stops[Math.min(stops.length - 1, Math.max(0, to))]);
  }

  const resized = new ResizeObserver((entries) => entries.forEach((entry) => draw(entry.target.closest("figure"))));
  let figures = [];

  function wireCurves() {
    resized.disconnect();
    figures = [...document.querySelectorAll("figure.chart")];
    for (const figure of figures) {
      const svg = figure.querySelector("svg");
      const follow = (event) => {
        if (!figure.drawn) return;
        const { edge, width, left, right } = figure.drawn;
        const share = (event.offsetX - edge) / (width - edge - margin.right);
        pointAt(figure, left + share * (right - left));
      };
      svg.addEventListener("pointermove", follow);
      svg.addEventListener("pointerdown", follow);
      svg.addEventListener("pointerleave", () => leave(figure));
      svg.addEventListener("keydown", (event) => onKey(figure, event));
      svg.addEventListener("blur", () => leave(figure));
      figure.querySelector("input[name=log]").addEventListener("change", () => draw(figure));
      resized.observe(svg);
    }
    document.getElementById("controls")?.addEventListener("change", () => figures.forEach(draw));
  }

  /* Draw what a fresh page holds: `replaced`: in other panels than before. */
  function renewCurves(page, replaced) {
    data = read(page);
    if (replaced) wireCurves();
    else figures.forEach((figure) => {
      const at = figure.at;
      draw(figure);
      if (figure.drawn && at !== null && at !== undefined) pointAt(figure, at);
    });
  }

  // Samples --------------------------------------------------------------------------------------

  function showSamples() {
    const slider = document.getElementById("sample-step");
    const steps = slider.dataset.steps.split(" ").map(Number);
    const step = steps[slider.value];
    const text = step.toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${text}`);
    document.getElementById("sample-shown").textContent = text;
    for (const figure of document.querySelectorAll("figure.grid")) {
      const pictures = [...figure.querySelectorAll("img")];
      const current = pictures.filter((p) => Number(p.dataset.step) <= step).at(-1);
      for (const picture of pictures) picture.hidden = picture !== current;
      figure.querySelector(".none").hidden = Boolean(current);
      const own = current ? Number(current.dataset.step) : step;
      figure.querySelector(".of").textContent = own === step ? "" : `of step ${own.toLocaleString("en")}`;
    }
  }

  /* `chosen`: a step that was looked at before; without one, the newest. */
  function wireSamples(chosen) {
    const slider = document.getElementById("sample-step");
    if (!slider) return;
    const place = slider.dataset.steps.split(" ").indexOf(String(chosen));
    if (place >= 0) slider.value = place;
    slider.addEventListener("input", showSamples);
    showSamples();
  }

  wireCurves();
  wireSamples();
  return { renewCurves, wireSamples };
})();

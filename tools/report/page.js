"use strict";
const runs = JSON.parse(document.getElementById("data").textContent).runs;
const body = document.querySelector("#runs tbody");
const rows = new Map([...body.rows].map((row) => [Number(row.dataset.run), row]));
const chosen = new Set();
const MOST_MATRICES = 12;
const COLOURS = 7;
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

const shown = (value, digits = 2) => (value === null || value === undefined ? "" : Number(value).toFixed(digits));
const textOf = (value) => (value === undefined ? "(absent)" : JSON.stringify(value));

// The table: filter, sort, choose.

const TERM = /^([a-z_ ]+)(:|>|<)(.+)$/i;
const TITLES = new Map([...document.querySelectorAll("thead button")].map((b) => [b.textContent.toLowerCase(), b.dataset.column]));

function matches(run, word) {
  const term = word.match(TERM);
  if (!term) return [...rows.get(run).cells].some((cell) => cell.textContent.toLowerCase().includes(word));
  const value = runs[run][TITLES.get(term[1]) ?? term[1]];
  if (value === undefined || value === null) return false;
  if (term[2] === ":") return String(value).toLowerCase().includes(term[3]);
  return term[2] === ">" ? value > Number(term[3]) : value < Number(term[3]);
}

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  for (const [run, row] of rows) {
    row.hidden = !words.every((word) => matches(run, word));
    left += !row.hidden;
  }
  document.getElementById("count").textContent = `${left} of ${runs.length} runs, ${chosen.size} chosen`;
}

function sort(button) {
  const head = button.closest("th");
  const rising = head.getAttribute("aria-sort") !== "ascending";
  for (const other of document.querySelectorAll("thead th[aria-sort]")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = (row) => runs[Number(row.dataset.run)][button.dataset.column];
  const sign = rising ? 1 : -1;
  const compare = (left, right) => {
    const [a, b] = [value(left), value(right)];
    if (a === b) return 0;
    if (a === null || a === undefined) return 1; // what is not known comes last, either way
    if (b === null || b === undefined) return -1;
    return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  };
  body.append(...[...body.rows].sort(compare));
}

function choose(list, on) {
  for (const run of list) {
    if (on) chosen.add(run);
    else chosen.delete(run);
    rows.get(run).querySelector("input").checked = on;
    rows.get(run).classList.toggle("chosen", on);
  }
  filter();
  show();
}

// What is chosen.

function show() {
  const list = [...chosen].filter((run) => runs[run].curve);
  replace("curves", list.length ? [curves(list)] : [nothing()]);
  const some = list.slice(0, MOST_MATRICES).map(matrix);
  if (list.length > MOST_MATRICES) some.push(make("p", {}, `The first ${MOST_MATRICES} of ${list.length} chosen runs.`));
  replace("matrices", list.length ? some : [nothing()]);
  replace("costs", list.length ? [costs(list)] : [nothing()]);
}

const nothing = () => make("p", {}, "No run with results is chosen.");
const replace = (id, nodes) => document.getElementById(id).replaceChildren(...nodes);
const styleOf = (index) => ({
  stroke: `var(--c${index % COLOURS})`,
  "stroke-dasharray": DASHES[Math.floor(index / COLOURS) % DASHES.length],
});

function marker(index, x, y) {
  const fill = `var(--c${index % COLOURS})`;
  const kinds = [
    () => draw("circle", { cx: x, cy: y, r: 3.5, fill }),
    () => draw("rect", { x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4, fill }),
    () => draw("path", { d: `M${x} ${y - 4.2}L${x + 4} ${y + 3}L${x - 4} ${y + 3}Z`, fill }),
    () => draw("path", { d: `M${x} ${y - 4.4}L${x + 4.4} ${y}L${x} ${y + 4.4}L${x - 4.4} ${y}Z`, fill }),
    () => draw("path", { d: `M${x} ${y + 4.2}L${x + 4} ${y - 3}L${x - 4} ${y - 3}Z`, fill }),
  ];
  return kinds[index % kinds.length]();
}

function niceStep(range, count) {
  const rough = range / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}

function curves(list) {
  const [width, height, left, right, top, bottom] = [900, 400, 52, 14, 12, 44];
  const values = list.flatMap((run) => runs[run].curve).filter((value) => value !== null);
  const tasks = Math.max(...list.map((run) => runs[run].curve.length));
  const margin = Math.max(0.06 * (Math.max(...values) - Math.min(...values)), 0.5);
  const [low, high] = [Math.max(Math.min(...values) - margin, 0), Math.min(Math.max(...values) + margin, 100.5)];
  const x = (task) => left + ((width - left - right) * (tasks === 1 ? 0.5 : task / (tasks - 1)));
  const y = (value) => top + ((height - top - bottom) * (high - value)) / (high - low);
  const label = `accuracy after each task of ${list.length} runs; the numbers are in the table below the figure`;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  const step = niceStep(high - low, 6);
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
    svg.append(draw("line", { class: "rule", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, shown(value, step < 1 ? 1 : 0)));
  }
  const every = Math.max(1, niceStep(tasks, 14));
  for (let task = 1; task <= tasks; task += 1) {
    if (task !== 1 && task % every) continue;
    svg.append(draw("text", { x: x(task - 1), y: height - bottom + 20, "text-anchor": "middle" }, task));
  }
  svg.append(draw("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }));
  svg.append(draw("text", { x: (width + left) / 2, y: height - 6, "text-anchor": "middle" }, "tasks learned"));
  const legend = make("ul", { class: "legend" });
  list.forEach((run, index) => {
    const points = runs[run].curve.map((value, task) => [x(task), y(value)]);
    svg.append(draw("polyline", { points: points.join(" "), fill: "none", "stroke-width": 2, ...styleOf(index) }));
    const thin = Math.max(1, Math.ceil(points.length / 25));
    points.forEach(([px, py], task) => {
      if (task % thin && task !== points.length - 1) return;
      const point = marker(index, px, py);
      point.append(draw("title", {}, `${runs[run].run}, task ${task + 1}: ${shown(runs[run].curve[task])}`));
      svg.append(point);
    });
    const swatch = draw("svg", { width: 34, height: 12, "aria-hidden": "true" });
    swatch.append(draw("line", { x1: 0, x2: 34, y1: 6, y2: 6, "stroke-width": 2, ...styleOf(index) }), marker(index, 17, 6));
    legend.append(make("li", {}, swatch, `${runs[run].run} (${shown(runs[run].curve.at(-1))})`));
  });
  return make("figure", {}, svg, legend, numbers(list, tasks));
}

function table(caption, head, lines, kind = {}) {
  const made = make("table", {}, make("caption", {}, caption));
  const titles = head.map((title, index) => make("th", { scope: "col", ...(index ? kind : {}) }, title));
  made.append(make("thead", {}, make("tr", {}, ...titles)));
  const inside = make("tbody");
  for (const [first, ...cells] of lines) {
    const others = cells.map((cell) => make("td", kind, cell));
    inside.append(make("tr", {}, make("th", { scope: "row" }, first), ...others));
  }
  made.append(inside);
  return made;
}

function numbers(list, tasks) {
  const head = ["run", ...Array.from({ length: tasks }, (_, task) => `${task + 1}`)];
  const lines = list.map((run) => [runs[run].run, ...head.slice(1).map((_, task) => shown(runs[run].curve[task]))]);
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "accuracy after each task" });
  scroll.append(table("Accuracy after each task", head, lines, { class: "number" }));
  return make("details", {}, make("summary", {}, "The numbers"), scroll);
}

// Viridis at a few points; between them straight.
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const index = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[index].map((from, c) => Math.round(from + (place - index) * (VIRIDIS[index + 1][c] - from)));
}

const percent = (value) => (value === 100 ? "100" : Math.min(value, 99.9).toFixed(1));

function matrix(run) {
  const { acc } = runs[run];
  const known = acc.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const share = (value) => (value - low) / Math.max(high - low, 1);
  const columns = Math.max(...acc.map((row) => row.length));
  const side = 340;
  const label = `accuracy per task of ${runs[run].run}, from ${shown(low)} to ${shown(high)} percent`;
  const canvas = make("canvas", { width: 2 * side, height: 2 * side, style: `width:${side}px;max-width:100%`, role: "img", "aria-label": label });
  const context = canvas.getContext("2d");
  const [w, h] = [(2 * side) / columns, (2 * side) / acc.length];
  acc.forEach((row, t) => row.forEach((value, i) => {
    if (value === null) return;
    context.fillStyle = `rgb(${colour(share(value))})`;
    context.fillRect(Math.floor(i * w), Math.floor(t * h), Math.ceil(w), Math.ceil(h));
    if (columns > 12) return;
    context.fillStyle = share(value) < 0.6 ? "#ffffff" : "#000000";
    context.font = `${Math.min(24, w / 2.6)}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(percent(value), (i + 0.5) * w, (t + 0.5) * h);
  }));
  const caption = `${runs[run].run}: after task (down), on task (right); ${shown(low, 1)} dark, ${shown(high, 1)} bright`;
  return make("figure", {}, canvas, make("figcaption", {}, caption));
}

function costs(list) {
  const phases = [...new Set(list.flatMap((run) => Object.keys(runs[run].phases ?? {})))];
  const head = ["run", ...phases.map((phase) => `${phase} s`), "memory MiB", "stored MiB", "images/s"];
  const lines = list.map((run) => {
    const entry = runs[run];
    const seconds = phases.map((phase) => shown(entry.phases?.[phase], 1));
    return [entry.run, ...seconds, shown(entry.memory, 0), shown(entry.stored, 1), shown(entry.speed, 0)];
  });
  return table("Seconds by phase, peak memory, bytes kept after the last task", head, lines, { class: "number" });
}

function differences() {
  const [left, right] = ["left", "right"].map((id) => runs[Number(document.getElementById(id).value)]);
  const keys = [...new Set([...Object.keys(left.config), ...Object.keys(right.config)])].sort();
  const lines = keys
    .filter((key) => textOf(left.config[key]) !== textOf(right.config[key]))
    .map((key) => [key, textOf(left.config[key]), textOf(right.config[key])]);
  replace("differences", lines.length
    ? [table(`${lines.length} of ${keys.length} keys differ`, ["key", left.run, right.run], lines)]
    : [make("p", {}, "These two configs are the same.")]);
}

// Beginning.

for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
document.getElementById("filter").addEventListener("input", filter);
document.getElementById("choose").addEventListener("click", () => choose([...rows.keys()].filter((run) => !rows.get(run).hidden), true));
document.getElementById("clear").addEventListener("click", () => choose([...chosen], false));
body.addEventListener("change", (event) => choose([Number(event.target.dataset.run)], event.target.checked));
for (const [id, first] of [["left", 0], ["right", Math.min(1, runs.length - 1)]]) {
  const select = document.getElementById(id);
  runs.forEach((run, number) => select.append(make("option", { value: number }, run.run)));
  select.value = first;
  select.addEventListener("change", differences);
}
const wanted = runs.findIndex((run) => run.curve);
if (wanted >= 0) choose([wanted], true);
filter();
differences();

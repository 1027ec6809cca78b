"use strict";
// Everything that a run says enters the page as text (textContent), never as markup; only the lineage is markup, and the
// server has escaped it.

const EVERY = 2000; // milliseconds between two looks
const FIRST = 12; // runs that are shown at first: the newest
const COLOURS = ["#0b7a75", "#d1495b", "#3d5a98", "#e09f3e", "#7b4b94", "#5b8e3e", "#b5651d", "#2a9fd6", "#8d6e63",
  "#c2185b", "#607d3b", "#455a94"];

const $ = (id) => document.getElementById(id);
const state = {runs: [], shown: new Set(), curves: new Map(), tab: "curves", large: new Set(), known: new Set()};

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

async function ask(path) {
  const response = await fetch(path);
  const found = await response.json().catch(() => ({error: `${path}: ${response.status}`}));
  if (!response.ok) throw new Error(found.error || `${path}: ${response.status}`);
  return found;
}

// ---- what is there

async function look() {
  try {
    const runs = await ask("/api/runs");
    const fresh = runs.filter((run) => !state.known.has(run.id));
    const newest = [...fresh].sort((a, b) => b.started - a.started);
    newest.slice(0, Math.max(0, FIRST - state.shown.size)).forEach((run) => state.shown.add(run.id));
    fresh.forEach((run) => state.known.add(run.id));
    const changed = JSON.stringify(runs) !== JSON.stringify(state.runs);
    state.runs = runs;
    $("trouble").hidden = true;
    $("live").textContent = runs.some(isRunning) ? "live" : "";
    if (changed) list();
    await draw(changed);
  } catch (error) {
    $("trouble").textContent = error instanceof TypeError ? "the server does not answer" : error.message;
    $("trouble").hidden = false;
  }
  setTimeout(look, EVERY);
}

const isRunning = (run) => run.state === "running" && Date.now() / 1000 - run.updated < 120;
const colour = (run) => COLOURS[state.runs.findIndex((one) => one.id === run.id) % COLOURS.length];
const dash = (run) => (state.runs.findIndex((one) => one.id === run.id) >= COLOURS.length ? [5, 3] : []);
const shown = () => state.runs.filter((run) => state.shown.has(run.id));

function matches(text, words) {
  const low = text.toLowerCase();
  return words.toLowerCase().split(/\s+/).filter(Boolean)
    .every((word) => (word[0] === "-" && word.length > 1 ? !low.includes(word.slice(1)) : low.includes(word)));
}

function said(run) {
  const minutes = Math.round((Date.now() / 1000 - run.updated) / 60); // measuring, or killed: nobody can tell
  if (run.state === "running") return isRunning(run) ? [`step ${run.step}`, "running"] : [`silent ${minutes} min`, ""];
  if (run.state === "finished") return [run.scores.length ? run.scores[0].after : "finished", ""];
  return [run.state, run.state];
}

function list() {
  const box = $("runs");
  const visible = state.runs.filter((run) => matches(`${run.id} ${run.stage} ${run.group} ${run.state}`, $("filter").value));
  box.replaceChildren();
  let folder = null;
  for (const run of visible) {
    if (run.folder !== folder) {
      folder = run.folder;
      const inside = visible.filter((one) => one.folder === run.folder);
      if (folder) box.append(el("button", {class: "folder", type: "button", title: "all of this folder, or none",
        onclick: () => choose(inside, !inside.every((one) => state.shown.has(one.id)))}, `${folder}/`,
      run.group ? el("span", {}, ` · ${run.group}`) : null));
    }
    const check = el("input", {type: "checkbox", "aria-label": run.id});
    check.checked = state.shown.has(run.id);
    check.addEventListener("change", () => choose([run], check.checked));
    const mark = el("i");
    mark.style.background = colour(run);
    const [text, kind] = said(run);
    const title = [run.id, run.stage, run.group && `group ${run.group}`, run.scores[0] && run.scores[0].metric];
    box.append(el("div", {class: "run", title: title.filter(Boolean).join("\n")}, check, mark,
      el("a", {class: "name", href: `/run?id=${encodeURIComponent(run.id)}`, target: "_blank", rel: "noopener"}, run.name),
      el("span", {class: `state ${kind}`}, text)));
  }
  if (!visible.length) box.append(el("p", {class: "empty"}, state.runs.length ? "no run matches" : "no run yet"));
  $("count").textContent = `${state.shown.size} of ${state.runs.length}`;
}

function choose(runs, yes) {
  runs.forEach((run) => (yes ? state.shown.add(run.id) : state.shown.delete(run.id)));
  list();
  draw(true);
}

// ---- the four views

async function draw(changed) {
  if (state.tab === "curves") return curves(changed);
  if (!changed) return;
  if (state.tab === "scores") scores();
  if (state.tab === "media") await media();
  if (state.tab === "lineage") await lineage();
}

function scores() {
  const heads = ["run", "metric", "baseline", "before", "after", "95 % interval", "n"];
  const rows = shown().flatMap((run) => run.scores.map((score) => el("tr", {},
    el("td", {}, el("a", {href: `/run?id=${encodeURIComponent(run.id)}`, target: "_blank", rel: "noopener"}, run.id)),
    el("td", {}, `${score.metric} ${score.better === "higher" ? "↑" : "↓"}`,
      score.lacking ? el("div", {class: "short"}, score.lacking) : null),
    el("td", {class: "num"}, score.baseline, el("div", {class: "short"}, score.baseline_name)),
    el("td", {class: "num"}, score.before), el("td", {class: "num"}, el("b", {}, score.after)),
    el("td", {class: "num"}, score.interval), el("td", {class: "num"}, score.n))));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))),
    el("tbody", {}, ...rows));
  $("scores").replaceChildren(rows.length ? el("div", {class: "wide"}, table) : nothing("no run that is shown has been measured yet"));
}

const nothing = (text) => el("p", {class: "empty"}, text);

async function media() {
  const names = [...new Set(shown().flatMap((run) => run.media.map((entry) => entry.name)))];
  const parts = [];
  for (const name of names) {
    const boxes = [];
    for (const run of shown()) {
      const entry = run.media.find((one) => one.name === name);
      if (!entry) continue;
      const place = `/media?run=${encodeURIComponent(run.id)}&name=${encodeURIComponent(name)}&v=${encodeURIComponent(entry.version)}`;
      const inside = entry.kind === "picture" ? picture(place, entry.caption) : table(await ask(place));
      boxes.push(el("figure", {}, el("figcaption", {class: "of"}, run.id), inside, el("p", {}, entry.caption)));
    }
    parts.push(el("h2", {}, name), el("div", {class: "gallery"}, ...boxes));
  }
  $("media").replaceChildren(...(parts.length ? parts : [nothing("no run that is shown has pictures or samples yet")]));
}

function picture(place, caption) {
  const image = el("img", {src: place, alt: caption, loading: "lazy"});
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 160));
  return image;
}

function table(rows) {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value) => (value == null ? "–" : typeof value === "number" ? figure(value) : String(value));
  return el("div", {class: "rows"}, el("table", {},
    el("thead", {}, el("tr", {}, ...columns.map((column) => el("th", {}, column)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...columns.map((column) => el("td", {}, cell(row[column]))))))));
}

async function lineage() {
  const {svg} = await ask("/api/lineage");
  if (!svg) return $("lineage").replaceChildren(nothing("no artifact yet"));
  const drawn = new DOMParser().parseFromString(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"'), "image/svg+xml");
  const graph = document.importNode(drawn.documentElement, true);
  graph.style.maxWidth = `${graph.viewBox.baseVal.width}px`;
  $("lineage").replaceChildren(graph);
}

// ---- curves

function rank(key) {
  const last = {"train/loss": 0, "train/grad_norm": 3, "train/lr": 4};
  const group = {eval: 1, train: 2, time: 6}[key.split("/")[0]];
  return last[key] ?? group ?? 5;
}

const isNoisy = (key) => /^(train|time)\//.test(key) && key !== "train/lr";

async function curves(changed) {
  let news = changed;
  for (const run of shown()) {
    const kept = state.curves.get(run.id);
    if (run.version && (!kept || kept.version !== run.version)) {
      state.curves.set(run.id, {version: run.version, curves: await ask(`/api/curves?run=${encodeURIComponent(run.id)}`)});
      news = true;
    }
  }
  if (news) charts();
}

function charts() {
  const all = shown().filter((run) => state.curves.has(run.id));
  const of = (run) => state.curves.get(run.id).curves;
  const keys = [...new Set(all.flatMap((run) => Object.keys(of(run))))]
    .filter((key) => matches(key, $("keys").value) && all.some((run) => (of(run)[key]?.line.length ?? 0) > 1))
    .sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
  const box = $("curves");
  const old = new Map([...box.querySelectorAll("figure")].map((figure) => [figure.dataset.key, figure]));
  const grid = el("div", {class: "charts"});
  for (const key of keys) {
    const made = old.get(key) ?? frame(key);
    made.classList.toggle("large", state.large.has(key));
    made.lines = all.filter((run) => of(run)[key]).map((run) => ({run, ...of(run)[key]}));
    grid.append(made);
  }
  box.replaceChildren(keys.length ? grid : nothing("no curve: choose runs on the left"));
  grid.querySelectorAll("figure").forEach(paint);
}

function frame(key) {
  const canvas = el("canvas", {role: "img", "aria-label": key});
  const made = el("figure", {"data-key": key}, el("figcaption", {}, el("span", {}, key),
    el("button", {type: "button", onclick: () => { toggle(state.large, key); charts(); }}, "size")), canvas);
  canvas.addEventListener("mousemove", (event) => hover(made, event));
  canvas.addEventListener("mouseleave", () => { $("tip").hidden = true; paint(made); });
  return made;
}

const toggle = (set, one) => (set.has(one) ? set.delete(one) : set.add(one));

function smooth(line, window) {
  if (!window) return line;
  const half = Math.ceil((line.length * window) / 200);
  return line.map(([x, y], i) => {
    const near = line.slice(Math.max(0, i - half), i + half + 1).map((point) => point[1]).filter((value) => value != null);
    return [x, y == null || !near.length ? null : near.reduce((a, b) => a + b, 0) / near.length];
  });
}

const least = (values) => values.reduce((a, b) => Math.min(a, b)); // not Math.min(...values): there may be too many
const most = (values) => values.reduce((a, b) => Math.max(a, b));

function limits(values, logarithmic) {
  let [low, high] = [least(values), most(values)];
  if (low === high) [low, high] = logarithmic ? [low / 2, high * 2] : [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)];
  if (logarithmic) return [low / 1.1, high * 1.1];
  const room = (high - low) * 0.05;
  return [low >= 0 && low < room ? 0 : low - room, high + room];
}

function ticks(low, high, most) {
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => Math.floor(high / s + 1e-9) - Math.ceil(low / s - 1e-9) <= most);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => (first + i) * step);
}

function logTicks(low, high) {
  const [first, last] = [Math.ceil(Math.log10(low)), Math.floor(Math.log10(high))];
  const found = Array.from({length: Math.max(0, last - first + 1)}, (_, i) => 10 ** (first + i));
  return found.length > 1 ? found : ticks(low, high, 4);
}

function figure(value) {
  if (value == null) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e3 && size < 1e12) {
    const [unit, letter] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : [1e3, "k"];
    return `${+(value / unit).toPrecision(4)}${letter}`;
  }
  return size < 1e-3 || size >= 1e12 ? (+value.toPrecision(3)).toExponential() : String(+value.toPrecision(4));
}

function paint(made) {
  const canvas = made.querySelector("canvas");
  const [width, height, ratio] = [canvas.clientWidth, canvas.clientHeight, window.devicePixelRatio || 1];
  if (!width) return;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const logarithmic = $("log").checked;
  const usable = (value) => value != null && (!logarithmic || value > 0);
  const span = isNoisy(made.dataset.key) ? +$("smooth").value : 0;
  const lines = made.lines.map((one) => ({...one, drawn: smooth(one.line, span)}));
  const xs = lines.flatMap((one) => one.line.map((point) => point[0]));
  const banded = lines.length < 4;
  const ys = lines.flatMap((one) => [...one.line.map((point) => point[1]), ...(banded ? one.band.flatMap((b) => [b[1], b[2]]) : [])]).filter(usable);
  made.scale = null;
  pen.font = `10px ${style.getPropertyValue("--sans")}`;
  pen.fillStyle = style.getPropertyValue("--faint");
  if (!ys.length) return pen.fillText(logarithmic ? "no value above zero" : "no finite value", 46, height / 2);
  const [low, high] = limits(ys, logarithmic);
  const [left, right, top, bottom] = [46, width - 8, 8, height - 20];
  const [first, last] = [least(xs), Math.max(most(xs), xs[0] + 1)];
  const height01 = logarithmic
    ? (y) => (Math.log(y) - Math.log(low)) / (Math.log(high) - Math.log(low))
    : (y) => (y - low) / (high - low);
  const X = (x) => left + ((x - first) / (last - first)) * (right - left);
  const Y = (y) => bottom - height01(y) * (bottom - top);
  made.scale = {X, Y, left, right, first, last, lines, usable};

  pen.strokeStyle = style.getPropertyValue("--rule");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  for (const value of logarithmic ? logTicks(low, high) : ticks(low, high, 4)) {
    pen.beginPath();
    pen.moveTo(left, Y(value));
    pen.lineTo(right, Y(value));
    pen.stroke();
    pen.fillText(figure(value), left - 6, Y(value) + 3.5);
  }
  for (const value of ticks(first, last, 5)) {
    pen.textAlign = X(value) > right - 12 ? "right" : "center";
    pen.fillText(figure(value), X(value), bottom + 14);
  }
  for (const one of lines) {
    pen.strokeStyle = pen.fillStyle = colour(one.run);
    if (one.band.length && banded) {
      pen.globalAlpha = 0.15;
      pen.beginPath();
      one.band.forEach(([x, , y]) => pen.lineTo(X(x), Y(usable(y) ? y : low)));
      [...one.band].reverse().forEach(([x, y]) => pen.lineTo(X(x), Y(usable(y) ? y : low)));
      pen.fill();
    }
    pen.lineWidth = 1;
    pen.globalAlpha = 0.25;
    if (one.drawn !== one.line) trace(pen, one.line, made.scale);
    pen.globalAlpha = 1;
    pen.lineWidth = 1.5;
    pen.setLineDash(dash(one.run));
    trace(pen, one.drawn, made.scale);
    pen.setLineDash([]);
  }
}

function trace(pen, line, {X, Y, usable}) {
  let down = false;
  pen.beginPath();
  line.forEach(([x, y], i) => {
    if (!usable(y)) { down = false; return; }
    if (down) pen.lineTo(X(x), Y(y));
    else pen.moveTo(X(x), Y(y));
    if (!down && (i + 1 === line.length || !usable(line[i + 1][1]))) { // alone between gaps
      pen.moveTo(X(x) + 2, Y(y));
      pen.arc(X(x), Y(y), 2, 0, 7);
    }
    down = true;
  });
  pen.stroke();
}

function hover(made, event) {
  paint(made);
  if (!made.scale) return;
  const {X, Y, left, right, first, last, lines, usable} = made.scale;
  const box = event.target.getBoundingClientRect();
  const at = first + ((event.clientX - box.left - left) / (right - left)) * (last - first);
  const pen = event.target.getContext("2d");
  const found = lines.map((one) => {
    const known = one.drawn.filter((point) => usable(point[1]));
    return {run: one.run, point: known.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a), known[0])};
  }).filter((one) => one.point).sort((a, b) => b.point[1] - a.point[1]);
  if (!found.length) return;
  for (const {run, point} of found) {
    pen.fillStyle = colour(run);
    pen.beginPath();
    pen.arc(X(point[0]), Y(point[1]), 3, 0, 7);
    pen.fill();
  }
  const tip = $("tip");
  tip.replaceChildren(...found.slice(0, 16).map(({run, point}) => {
    const mark = el("i");
    mark.style.background = colour(run);
    return el("div", {}, mark, el("span", {}, run.id), el("b", {}, `${figure(point[1])} at ${figure(point[0])}`));
  }));
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

// ---- controls

function show(tab) {
  state.tab = tab;
  for (const button of document.querySelectorAll("nav>button")) {
    const mine = button.dataset.tab === tab;
    button.setAttribute("aria-selected", mine);
    $(button.dataset.tab).hidden = !mine;
  }
  document.querySelector(".tools").hidden = tab !== "curves";
  draw(true);
}

document.querySelectorAll("nav>button").forEach((button) => button.addEventListener("click", () => { location.hash = button.dataset.tab; }));
addEventListener("hashchange", () => show(location.hash.slice(1) in {scores: 1, media: 1, lineage: 1} ? location.hash.slice(1) : "curves"));
addEventListener("resize", () => document.querySelectorAll("#curves figure").forEach(paint));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.querySelectorAll("#curves figure").forEach(paint));
$("filter").addEventListener("input", list);
$("keys").addEventListener("input", charts);
for (const id of ["smooth", "log"]) $(id).addEventListener("input", charts);
const filtered = () => state.runs.filter((run) => matches(`${run.id} ${run.stage} ${run.group} ${run.state}`, $("filter").value));
$("all").addEventListener("click", () => choose(filtered(), true));
$("none").addEventListener("click", () => choose(filtered(), false));
dispatchEvent(new HashChangeEvent("hashchange"));
look();

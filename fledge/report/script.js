// Values under the pointer, and whose ancestor a stage is. Without this script the page says the same, but slower.
"use strict";
{
  const figure = v => v === null ? "–" : v === 0 ? "0"
    : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? String(+v.toPrecision(4)) : v.toExponential(2);

  const make = (parent, name, attributes) => {
    const element = document.createElementNS(parent.namespaceURI, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    parent.append(element);
    return element;
  };

  const onto = ([low, high, start, end], v) => start + (v - low) / (high - low || 1) * (end - start);
  const back = ([low, high, start, end], px) => low + (px - start) / (end - start) * (high - low);

  // Where the pointer is, in the drawing's own units.
  const place = (svg, event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    return [(event.clientX - box.left) * view.width / box.width, (event.clientY - box.top) * view.height / box.height];
  };

  const at = (line, i) => line.at ? line.at[i] : line.from + i * line.by;
  const nearest = (line, x) => {
    const n = line.y.length - 1;
    if (!line.at) return Math.max(0, Math.min(n, Math.round((x - line.from) / line.by)));
    let best = 0;
    line.at.forEach((other, i) => { if (Math.abs(other - x) < Math.abs(line.at[best] - x)) best = i; });
    return best;
  };

  // Curves: a rule at the step, a dot on each line, the values in the caption.
  const curves = (svg, data, caption) => {
    const cursor = make(svg, "g", {class: "cursor"}), [, , y0, y1] = data.y;
    const rule = make(cursor, "path", {});
    const dots = data.lines.map((_, i) => make(cursor, "circle", {r: 3, class: i ? "c" + i : ""}));
    return ([px]) => {
      const [, , start, end] = data.x;
      const x = back(data.x, Math.max(start, Math.min(end, px)));
      const step = at(data.lines[0], nearest(data.lines[0], x));
      rule.setAttribute("d", `M${onto(data.x, step)} ${y0}V${y1}`);
      const values = data.lines.map((line, i) => {
        const k = nearest(line, x), y = line.y[k];
        dots[i].setAttribute("cx", onto(data.x, at(line, k)));
        dots[i].setAttribute("cy", y === null ? -9 : onto(data.y, y));
        return figure(y);
      });
      caption(`step ${+step.toPrecision(6)}`, values);
    };
  };

  // Points: a ring around the nearest one, what it says in the caption.
  const points = (svg, data, caption) => {
    const cursor = make(svg, "g", {class: "cursor"}), ring = make(cursor, "circle", {r: 6, class: "ring"});
    return ([px, py]) => {
      const near = data.points.reduce((a, b) => Math.hypot(a[0] - px, a[1] - py) <= Math.hypot(b[0] - px, b[1] - py) ? a : b);
      ring.setAttribute("cx", near[0]);
      ring.setAttribute("cy", near[1]);
      caption("", [near[2]]);
    };
  };

  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const chart = svg.closest("figure"), step = chart.querySelector("[data-step]");
    const places = [...chart.querySelectorAll("[data-value]")], rest = places.map(b => b.textContent);
    const caption = (where, values) => {
      if (step) step.textContent = where;
      values.forEach((v, i) => { if (places[i]) places[i].textContent = where && !step ? `${where} · ${v}` : v; });
    };
    let show;
    const move = event => {
      if (!show) {
        const data = JSON.parse(svg.dataset.hover);
        show = (data.points ? points : curves)(svg, data, caption);
      }
      chart.classList.add("read");
      show(place(svg, event));
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", () => { chart.classList.remove("read"); caption("", rest); });
  }

  // The lineage: who a stage comes from, and who comes from it.
  for (const graph of document.querySelectorAll("svg.graph")) {
    const edges = [...graph.querySelectorAll("[data-edge]")].map(path => [path, ...path.dataset.edge.split(" ")]);
    const nodes = [...graph.querySelectorAll("[data-node]")];
    const reach = (from, a, b) => {
      const found = new Set([from]), todo = [from];
      while (todo.length) {
        const now = todo.pop();
        for (const edge of edges) if (edge[a] === now && !found.has(edge[b])) { found.add(edge[b]); todo.push(edge[b]); }
      }
      return found;
    };
    const trace = number => {
      const up = reach(number, 2, 1), down = reach(number, 1, 2);
      graph.classList.add("traced");
      for (const node of nodes) node.classList.toggle("lit", up.has(node.dataset.node) || down.has(node.dataset.node));
      for (const [path, a, b] of edges) {
        path.classList.toggle("lit", up.has(a) && up.has(b) || down.has(a) && down.has(b));
      }
    };
    const rest = () => graph.classList.remove("traced");
    for (const node of nodes) {
      const holder = node.closest("a") || node;
      holder.addEventListener("pointerenter", () => trace(node.dataset.node));
      holder.addEventListener("focus", () => trace(node.dataset.node));
      holder.addEventListener("pointerleave", rest);
      holder.addEventListener("blur", rest);
    }
  }
}

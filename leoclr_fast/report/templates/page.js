// Reads values off the curves: the pointer, or the arrow keys once a plot has the focus.
"use strict";
(() => {
  const plots = JSON.parse(document.getElementById("plot-data").textContent);
  const number = (value) => {
    if (value === null) return "not a number";
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
    return value.toLocaleString("en", { maximumFractionDigits: size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 3 : 5 });
  };
  const nearest = (xs, x) =>
    xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);

  for (const [name, plot] of Object.entries(plots)) {
    const holder = document.getElementById(`plot-${name}`);
    const svg = holder.querySelector("svg");
    const drawn = (tag) => document.createElementNS(svg.namespaceURI, tag);
    const [left, top, width, height] = plot.box;
    const place = (x, y) => [
      left + (width * (x - plot.x[0])) / (plot.x[1] - plot.x[0]),
      top + height * (1 - (y - plot.y[0]) / (plot.y[1] - plot.y[0])),
    ];
    const stops = [...new Set(plot.curves.filter((curve) => !curve.reference).flatMap((curve) => curve.x))]
      .sort((a, b) => a - b);
    if (!stops.length) continue;

    const layer = drawn("g");
    const line = drawn("line");
    line.setAttribute("class", "cursor");
    line.setAttribute("y1", top);
    line.setAttribute("y2", top + height);
    layer.append(line);
    const dots = plot.curves.map((curve) => {
      const dot = drawn("circle");
      dot.setAttribute("r", 4);
      dot.style.fill = curve.colour;
      layer.append(dot);
      return dot;
    });
    layer.style.display = "none";
    svg.append(layer);
    const readout = document.createElement("div");
    readout.className = "readout";
    readout.hidden = true;
    holder.append(readout);

    let stop = stops.length - 1;
    const show = (index) => {
      stop = Math.max(0, Math.min(stops.length - 1, index));
      const x = stops[stop];
      const at = `${plot.xLabel} ${number(x)}`;
      const heading = document.createElement("b");
      heading.textContent = at;
      const rows = [];
      plot.curves.forEach((curve, i) => {
        const point = curve.x.length ? nearest(curve.x, x) : -1;
        // A curve is not read where it has no point near: beyond its ends, that is.
        const inside = point >= 0 && x >= curve.x[0] && x <= curve.x[curve.x.length - 1];
        const y = inside ? curve.y[point] : undefined;
        dots[i].style.display = typeof y === "number" ? "" : "none";
        if (y === undefined) return;
        if (y !== null) {
          const [cx, cy] = place(curve.x[point], y);
          dots[i].setAttribute("cx", cx);
          dots[i].setAttribute("cy", cy);
        }
        const away = curve.x[point] === x ? "" : ` (at ${number(curve.x[point])})`;
        rows.push(`${curve.label}: ${number(y)}${y === null ? "" : plot.unit.replace(" ", "\u00a0")}${away}`);
      });
      readout.replaceChildren(heading, ...rows.map((text) => {
        const row = document.createElement("div");
        row.textContent = text;
        return row;
      }));
      const [cx] = place(x, plot.y[0]);
      line.setAttribute("x1", cx);
      line.setAttribute("x2", cx);
      layer.style.display = "";
      readout.hidden = false;
      const share = cx / plot.width;
      readout.style.left = share < 0.5 ? `calc(${100 * share}% + 0.6rem)` : "";
      readout.style.right = share < 0.5 ? "" : `calc(${100 * (1 - share)}% + 0.6rem)`;
      readout.style.maxWidth = `calc(${100 * Math.max(share, 1 - share)}% - 0.6rem)`;
      holder.setAttribute("aria-valuenow", String(stop));
      holder.setAttribute("aria-valuetext", [at, ...rows].join(", "));
    };
    const hide = () => {
      layer.style.display = "none";
      readout.hidden = true;
    };

    holder.setAttribute("role", "slider");
    holder.setAttribute("aria-label", `${holder.getAttribute("aria-label")} Arrow keys read the values.`);
    holder.setAttribute("aria-valuemin", "0");
    holder.setAttribute("aria-valuemax", String(stops.length - 1));
    holder.setAttribute("aria-valuenow", String(stop));
    holder.setAttribute("aria-valuetext", `${plot.xLabel} ${number(stops[stop])}`);
    holder.tabIndex = 0;
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.width;
      show(nearest(stops, plot.x[0] + ((x - left) / width) * (plot.x[1] - plot.x[0])));
    };
    holder.addEventListener("pointerdown", follow);
    holder.addEventListener("pointermove", follow);
    holder.addEventListener("pointerleave", () => {
      if (document.activeElement !== holder) hide();
    });
    holder.addEventListener("focus", () => {
      if (holder.matches(":focus-visible")) show(stop);
    });
    holder.addEventListener("blur", hide);
    const jump = Math.max(1, Math.round(stops.length / 10));
    holder.addEventListener("keydown", (event) => {
      const moves = {
        ArrowLeft: stop - 1, ArrowDown: stop - 1, ArrowRight: stop + 1, ArrowUp: stop + 1,
        PageDown: stop - jump, PageUp: stop + jump, Home: 0, End: stops.length - 1,
      };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(moves[event.key]);
    });
  }
})();

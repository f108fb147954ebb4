"use strict";
(async () => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const byId = (id) => document.getElementById(id);
  const narrow = () => window.innerWidth < 620;
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const shown = new Map(facts.shown.map((one) => [one.label, one]));
  const nameOf = (label) => facts.classes[label].name;
  const number = (value) => value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString();
  let picked = facts.shown.length ? facts.shown[0].label : null;

  function make(tag, about = {}, ...children) {
    const { className, text, ...rest } = about;
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(rest)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // What a run says is anybody's text, and plotly reads tags and links in what it is given. So `draw` escapes every string, but
  // for those that are marked as ours: markup`<b>${anybody's}</b>` escapes what is put in.
  class Markup { constructor(text) { this.text = text; } }
  const plain = (text) => text instanceof Markup ? text.text
    : String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const markup = (parts, ...values) => new Markup(String.raw({ raw: parts }, ...values.map(plain)));
  const lines = (texts) => new Markup(texts.map(plain).join("<br>"));
  function escaped(value) {
    if (typeof value === "string" || value instanceof Markup) return plain(value);
    if (Array.isArray(value)) return value.map(escaped);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, escaped(part)]));
  }

  // --- pictures ---

  function picture(uri, what) {
    const image = make("img", { src: uri, alt: what, loading: "eager", decoding: "async" });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 64), { once: true });
    return image;
  }

  const kinds = { distilled: "distilled", start: "its start", real: facts.real_caption };
  const short = { distilled: "distilled", start: "start", real: "real" };

  function caption(one, image) {
    const words = [`weight ${number(one.weights[image.atom])}`];
    if (image.image_distance !== undefined) words.push(`${number(image.image_distance)} from its atom`);
    if (image.real_distance !== undefined) words.push(`the real one ${number(image.real_distance)}`);
    return words;
  }

  function enlarge(one, image) {
    const box = byId("zoom");
    const three = make("div", { className: "three" });
    for (const [kind, words] of Object.entries(kinds)) {
      if (!image[kind]) continue;
      three.append(make("figure", {}, picture(image[kind], words), make("figcaption", { text: words })));
    }
    byId("zoom-body").replaceChildren(
      make("h3", { text: `${nameOf(one.label)}, image ${image.atom + 1} of ${one.weights.length}` }),
      three,
      make("p", { className: "about", text: caption(one, image).join(" · ") + " (squared distances, feature units)" }),
    );
    box.showModal();
  }

  function drawSheet() {
    const sheet = byId("sheet");
    if (!sheet) return;
    sheet.classList.toggle("few", facts.shown.every((one) => one.images.length < 4));
    sheet.replaceChildren(...facts.shown.map((one) => {
      const strip = make("span", { className: "strip" });
      for (const image of one.images.slice(0, 10)) {
        const kind = image.distilled ? "distilled" : "real";
        if (image[kind]) strip.append(picture(image[kind], `${nameOf(one.label)}, ${kinds[kind]}`));
      }
      const row = make("button", { className: "row", type: "button" }, make("span", { text: nameOf(one.label) }), strip);
      row.addEventListener("click", () => { pick(one.label); byId("class").scrollIntoView(); });
      return row;
    }));
  }

  function drawWall() {
    const one = shown.get(picked);
    const most = Math.max(...one.weights);
    byId("wall").replaceChildren(...one.images.map((image) => {
      const three = make("div", { className: "three" });
      for (const [kind, words] of Object.entries(kinds)) {
        if (image[kind]) three.append(make("span", {}, picture(image[kind], words), make("span", { className: "kind", text: short[kind] })));
      }
      const level = make("i");
      level.style.width = `${100 * one.weights[image.atom] / most}%`;
      const card = make("button", { className: "card", type: "button", title: "enlarge" }, three,
        make("div", { className: "weight" }, level),
        ...caption(one, image).map((text) => make("span", { className: "about", text })));
      card.addEventListener("click", () => enlarge(one, image));
      return card;
    }));
    const left = one.weights.length - one.images.length;
    byId("wall-note").textContent = left > 0 ? `The ${one.images.length} heaviest of ${one.weights.length} images.` : "";
  }

  // --- charts ---

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(byId("plotly").textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    // Its maps, of which there are none here, bring a style sheet that the policy would refuse, unless its id is taken.
    for (const [, id] of script.textContent.matchAll(/getElementById\("([0-9a-f]{64})"\)/g)) document.head.append(make("meta", { id }));
    document.head.append(script);
  }

  function axisLook() {
    return {
      gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true,
      tickfont: { size: 12 }, title: { font: { size: 13 } },
    };
  }

  function layout(extra) {
    const axis = axisLook();
    const { xaxis = {}, yaxis = {}, ...rest } = extra;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("ink") },
      margin: { l: 10, r: 10, t: 10, b: 10 },
      hoverlabel: { bgcolor: color("sheet"), bordercolor: color("line"), font: { color: color("ink"), size: 12 }, align: "left" },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      dragmode: narrow() ? false : "zoom",
      xaxis: { ...axis, ...xaxis, title: { ...axis.title, ...(xaxis.title || {}) } },
      yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...(yaxis.title || {}) } },
      ...rest,
    };
  }

  const settings = { displayModeBar: false, responsive: true };

  function draw(id, traces, extra) {
    const where = byId(id);
    if (where) Plotly.react(where, escaped(traces), escaped(layout(extra)), settings);
  }

  function wrapped(text, width) {
    const wraps = [""];
    for (const word of text.split(" ")) {
      if ((wraps.at(-1) + word).length > width && wraps.at(-1)) wraps.push("");
      wraps[wraps.length - 1] += (wraps.at(-1) ? " " : "") + word;
    }
    return lines(wraps);
  }

  function drawAccuracy() {
    if (!facts.accuracy.length) return;
    const names = [...new Set(facts.accuracy.map((row) => row.name))].reverse();
    const place = new Map(names.map((name, i) => [name, i]));
    const looks = { soft: [color("accent"), "circle", 0.14], hard: [color("second"), "diamond", -0.14] };
    const traces = [];
    for (const [labels, [ink, symbol, shift]] of Object.entries(looks)) {
      const rows = facts.accuracy.filter((row) => row.labels === labels);
      if (!rows.length) continue;
      const y = (row) => place.get(row.name) + shift;
      traces.push({
        x: rows.flatMap((row) => row.top1.map((v) => 100 * v)), y: rows.flatMap((row) => row.top1.map(() => y(row))),
        mode: "markers", marker: { color: ink, size: 5, opacity: 0.45 }, hoverinfo: "skip", showlegend: false,
      }, {
        x: rows.map((row) => 100 * row.top1_mean), y: rows.map(y), name: `${labels} labels`, mode: "markers",
        error_x: { type: "data", array: rows.map((row) => 100 * row.top1_std), color: ink, thickness: 1.5, width: 5 },
        marker: { color: ink, size: 11, symbol },
        customdata: rows.map((row) => [row.name, (100 * row.top1_std).toFixed(1), row.num_seeds]),
        hovertemplate: markup`%{customdata[0]}<br>${labels} labels: %{x:.1f} ± %{customdata[1]} % (n = %{customdata[2]})<extra></extra>`,
      });
    }
    const teacher = facts.teacher_top1;
    draw("chart-accuracy", traces, {
      height: 100 + 58 * names.length,
      yaxis: { tickvals: names.map((_, i) => i), ticktext: names.map((name) => markup`${wrapped(name, narrow() ? 16 : 30)}  `),
        range: [-0.6, names.length - 0.4], zeroline: false, fixedrange: true },
      xaxis: { title: { text: "top-1, %" }, zeroline: false, fixedrange: true },
      shapes: teacher === null ? [] : [{ type: "line", x0: 100 * teacher, x1: 100 * teacher, y0: 0, y1: 1, yref: "paper",
        line: { color: color("faint"), dash: "dot", width: 1.5 } }],
      annotations: teacher === null ? [] : [{ x: 100 * teacher, y: 0, yref: "paper", yanchor: "bottom", xanchor: "right",
        text: `teacher ${(100 * teacher).toFixed(1)} `, showarrow: false, font: { size: 12, color: color("soft-ink") } }],
    });
  }

  function drawCosts() {
    const known = facts.classes.filter((one) => one.cost !== null).sort((a, b) => b.cost - a.cost);
    if (!known.length) return;
    const few = known.length <= (narrow() ? 12 : 60);
    draw("chart-cost", [{
      type: "bar", x: known.map((_, i) => i), y: known.map((one) => one.cost),
      marker: { color: known.map((one) => one.label === picked ? color("second") : color("accent")), line: { width: 0 } },
      customdata: known.map((one) => [one.name, one.num_images ?? "?", one.label]),
      hovertemplate: markup`%{customdata[0]}<br>W<sub>2</sub>² %{y:.4g}, %{customdata[1]} real images<extra></extra>`,
    }], {
      height: 320, bargap: few ? 0.3 : 0.05,
      xaxis: { tickvals: few ? known.map((_, i) => i) : [], ticktext: known.map((one) => one.name.length > 16 ? one.name.slice(0, 15) + "…" : one.name),
        title: { text: few ? "" : `${known.length} classes, largest cost first` }, tickangle: known.length > 6 && known.some((one) => one.name.length > 3) ? -40 : 0, fixedrange: true },
      yaxis: { title: { text: markup`W<sub>2</sub>² cost` }, rangemode: "tozero", fixedrange: true },
    });
    const where = byId("chart-cost");
    where.removeAllListeners("plotly_click");
    where.on("plotly_click", (event) => { const label = event.points[0].customdata[2]; if (shown.has(label)) pick(label); });
  }

  function drawProjection() {
    const one = shown.get(picked), plane = one.projection;
    byId("projection-absent").hidden = Boolean(plane);
    byId("chart-projection").hidden = !plane;
    if (!plane) return;
    const traces = [{
      x: plane.real[0], y: plane.real[1], mode: "markers", name: "real images",
      marker: { color: color("faint"), size: 5, opacity: 0.55 }, hoverinfo: "skip",
    }];
    if (plane.reached) {
      const x = [], y = [];
      plane.atoms[0].forEach((_, j) => {
        x.push(plane.atoms[0][j], plane.reached[0][j], null);
        y.push(plane.atoms[1][j], plane.reached[1][j], null);
      });
      traces.push({ x, y, mode: "lines", line: { color: color("soft-ink"), width: 1 }, hoverinfo: "skip", showlegend: false });
    }
    const most = Math.max(...one.weights);
    const size = one.weights.map((weight) => 8 + 12 * Math.sqrt(weight / most));
    const told = one.weights.map((weight, j) => [j + 1, number(weight)]);
    traces.push({
      x: plane.atoms[0], y: plane.atoms[1], mode: "markers", name: "atoms (size: weight)", customdata: told,
      marker: { color: color("accent"), symbol: "diamond-open", size, line: { width: 2 } },
      hovertemplate: markup`atom %{customdata[0]}, weight %{customdata[1]}<extra></extra>`,
    });
    if (plane.reached) traces.push({
      x: plane.reached[0], y: plane.reached[1], mode: "markers", name: "distilled images", customdata: told,
      marker: { color: color("second"), size: 8 }, hovertemplate: markup`distilled image %{customdata[0]}<extra></extra>`,
    });
    const share = plane.explained.map((v) => (100 * v).toFixed(0));
    draw("chart-projection", traces, {
      height: narrow() ? 380 : 640,
      xaxis: { title: { text: `1st component (${share[0]} % of the variance)` }, zeroline: false },
      yaxis: { title: { text: `2nd component (${share[1]} %)` }, zeroline: false, scaleanchor: "x" },
    });
  }

  function drawCurves() {
    const one = shown.get(picked), curves = one.curves;
    const none = !curves || !curves.at.length;
    byId("curves-absent").hidden = !none;
    byId("chart-curves").hidden = none;
    if (none) return;
    const looks = { total: ["total", color("ink")], feature: ["feature", color("accent")], bn: ["moments", color("second")],
      ce: ["cross-entropy", color("third")], anchor: ["anchors", color("third")] };
    const terms = [...new Set([...Object.keys(looks), ...Object.keys(curves.terms)])].filter((term) => term in curves.terms);
    const all = facts.shown.filter((other) => other.curves && other.curves.at.length === curves.at.length);
    const traces = [], axes = {};
    terms.forEach((term, i) => {
      const [name, ink] = looks[term] ?? [term, color("ink")], yaxis = i ? `y${i + 1}` : "y", values = curves.terms[term];
      traces.push({ x: curves.at, y: values, yaxis, mode: curves.at.length > 1 ? "lines" : "markers", name: nameOf(picked),
        line: { color: ink, width: 1.5 }, hovertemplate: "%{y:.4g}" });
      if (all.length > 1) {
        const mean = values.map((_, t) => all.reduce((sum, other) => sum + other.curves.terms[term][t], 0) / all.length);
        traces.push({ x: curves.at, y: mean, yaxis, mode: "lines", line: { color: color("soft-ink"), width: 1.5, dash: "dot" },
          name: "mean", hovertemplate: "%{y:.4g}" });
      }
      // From the top down, with a little air between.
      const top = 1 - i / terms.length, bottom = 1 - (i + 1) / terms.length;
      axes[i ? `yaxis${i + 1}` : "yaxis"] = { ...axisLook(), title: { text: name, font: { size: 13 } }, nticks: 4,
        domain: [bottom + 0.04, top - 0.02] };
    });
    const last = terms.length > 1 ? `y${terms.length}` : "y";
    draw("chart-curves", traces, {
      height: 70 + 120 * terms.length, showlegend: false, hovermode: "x", ...axes, xaxis: { title: { text: "iteration" }, anchor: last },
    });
  }

  function drawWeights() {
    const one = shown.get(picked);
    const sorted = one.weights.map((weight, j) => [weight, j + 1]).sort((a, b) => b[0] - a[0]);
    const even = 1 / sorted.length;
    draw("chart-weights", [{
      type: "bar", x: sorted.map((_, i) => i + 1), y: sorted.map(([weight]) => weight), customdata: sorted.map(([, j]) => j),
      marker: { color: color("accent") }, hovertemplate: markup`atom %{customdata}: %{y:.4g}<extra></extra>`,
    }], {
      height: 220, bargap: 0.2,
      xaxis: { title: { text: "atoms, heaviest first" }, fixedrange: true, tick0: 1, dtick: Math.ceil(sorted.length / 8) },
      yaxis: { title: { text: "weight" }, fixedrange: true, rangemode: "tozero", nticks: 5 },
      shapes: [{ type: "line", x0: 0, x1: 1, xref: "paper", y0: even, y1: even, line: { color: color("faint"), dash: "dot", width: 1.5 } }],
    });
  }

  function drawBytes() {
    if (!facts.bytes.length) return;
    const inks = [color("faint"), color("accent"), color("second"), color("third")];
    draw("chart-bytes", facts.bytes.map((part, i) => ({
      type: "bar", orientation: "h", name: part.name, x: [part.bytes], y: [part.bar], marker: { color: inks[i % inks.length] },
      hovertemplate: markup`${part.name}: ${part.told}<extra></extra>`,
    })), {
      height: 210, barmode: "stack", bargap: 0.35,
      xaxis: { title: { text: "bytes" }, exponentformat: "SI", ticksuffix: "B", fixedrange: true, nticks: narrow() ? 4 : 8 },
      yaxis: { fixedrange: true, autorange: "reversed", ticksuffix: "  " }, legend: { traceorder: "normal", orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    });
  }

  function drawTime() {
    const time = facts.time;
    if (!time.bars.length) return;
    const looks = {
      done: ["done", color("accent")], slow: ["straggler", color("second")], retried: ["retried", color("third")],
      cut: ["ended with its driver", color("faint")], failed: ["failed", color("bad")],
    };
    const height = Math.max(7, Math.min(20, 700 / time.num_lanes));
    const traces = [];
    for (const [state, [name, ink]] of Object.entries(looks)) {
      const bars = time.bars.filter((bar) => bar.state === state);
      if (!bars.length) continue;
      traces.push({
        type: "bar", orientation: "h", name, base: bars.map((bar) => bar.begin), x: bars.map((bar) => bar.seconds), y: bars.map((bar) => bar.lane),
        width: 0.82, marker: { color: ink, line: {
          // A seam between neighbors; a bar too short for one gets a pixel of its own color instead, or nobody would see it.
          color: bars.map((bar) => bar.seconds > 0.01 * time.length ? color("ground") : ink), width: height > 10 ? 1 : 0.5 } },
        text: bars.map((bar) => lines([markup`<b>${bar.unit}</b> (${bar.stage})`, `${bar.told} from ${bar.at}`,
          `attempt ${bar.attempt}${bar.node ? " on " + bar.node : ""}`, ...(bar.reason ? [wrapped(bar.reason, 48)] : [])])),
        textposition: "none", hovertemplate: markup`%{text}<extra></extra>`,
      });
    }
    const bands = time.stages.map((stage, i) => ({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: stage.first - 0.5, y1: stage.first + stage.lanes - 0.5,
      fillcolor: i % 2 ? "rgba(0,0,0,0)" : color("well"), line: { width: 0 }, layer: "below" }));
    const starts = time.sessions.map((session) => ({ type: "line", x0: session.begin, x1: session.begin, yref: "paper", y0: 0, y1: 1,
      line: { color: color("bad"), width: 1.5, dash: "dash" } })).slice(1);
    draw("chart-time", traces, {
      height: 130 + height * time.num_lanes, barmode: "overlay", showlegend: true, shapes: [...bands, ...starts],
      annotations: time.sessions.slice(1).map((session) => ({ x: session.begin, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, text: "restart",
        font: { size: 11, color: color("bad") } })),
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", yref: "paper", font: { size: 12 } }, margin: { l: 10, r: 10, t: time.sessions.length > 1 ? 50 : 30, b: 10 },
      xaxis: { title: { text: "seconds of work" }, zeroline: false, rangemode: "tozero" },
      yaxis: { tickvals: time.stages.map((stage) => stage.first + (stage.lanes - 1) / 2), ticktext: time.stages.map((stage) => `${stage.name}  `),
        range: [time.num_lanes - 0.5, -0.5], fixedrange: true, showgrid: false, zeroline: false },
    });
  }

  function drawClass() { drawProjection(); drawCurves(); drawWeights(); drawCosts(); }
  function drawAll() {
    drawAccuracy(); drawBytes(); drawTime();
    if (picked === null) drawCosts(); else drawClass();
  }

  // --- what is picked ---

  let drawn = false;
  function pick(label) {
    picked = label;
    byId("picker").value = String(label);
    drawWall();
    if (drawn) drawClass();
  }
  function step(by) {
    const at = facts.shown.findIndex((one) => one.label === picked);
    pick(facts.shown[(at + by + facts.shown.length) % facts.shown.length].label);
  }

  if (picked !== null) {
    byId("picker").append(...facts.shown.map((one) => make("option", { value: one.label, text: nameOf(one.label) })));
    byId("picker").addEventListener("change", (event) => pick(Number(event.target.value)));
    byId("before").addEventListener("click", () => step(-1));
    byId("after").addEventListener("click", () => step(1));
    const size = () => byId("wall").style.setProperty("--side", `${byId("size").value}px`);
    byId("size").addEventListener("input", size);
    size();
    byId("zoom").addEventListener("click", (event) => { if (event.target === byId("zoom")) byId("zoom").close(); });
    byId("zoom-close").addEventListener("click", () => byId("zoom").close());
    drawSheet();
    pick(picked);
  }
  byId("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).getPropertyValue("--ground").trim() === "#14171a";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    if (drawn) drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (drawn) drawAll(); });

  try {
    await loadPlotly();
    drawAll();
    drawn = true;
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    byId("charts-failed").hidden = false;
    throw error;
  }
})();

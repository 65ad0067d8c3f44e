// Draws the view of one text. Reading order: the data, show(), then its callers.
//
// Attention weights are bytes: 0 to data.levels encodes the square root of 0 to 1. Each head has one
// deflated map of S x S bytes, row by row (each row attends to the columns). A byte is also a shade.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const S = data.pieces.length;
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");

// What is shown. A pinned token stays when the pointer moves on.
const state = { layer: 0, head: 0, token: data.start, way: "from", pinned: false, hide: false, scaled: false };
let map = new Uint8Array(S * S); // of state.layer, state.head
let shades = map; // the same, each row divided by its largest if state.scaled
let ramp = []; // [red, green, blue] of every byte
let pixels = new Uint32Array(); // the same in the format of ImageData

// Small tools

/** A new element. Text is inserted as text, never as HTML. */
function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

async function inflate(base64) {
  const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const weight = (byte) => (byte / data.levels) ** 2;
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/** Black or white, whichever has more contrast on a colour (WCAG 2.2, relative luminance). */
function over(colour) {
  const [r, g, b] = colour.map((x) => {
    x /= 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** The colour of every byte, from the stops in the style sheet. */
function readRamp() {
  const stops = getComputedStyle(document.documentElement).getPropertyValue("--ramp").trim()
    .split(/\s+/).map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  ramp = Array.from({ length: data.levels + 1 }, (_, byte) => {
    const place = (byte / data.levels) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((x, i) => Math.round(x + (place - low) * (stops[low + 1][i] - x)));
  });
  pixels = new Uint32Array(Uint8Array.from(ramp.flatMap((colour) => [...colour, 255])).buffer);
}

/** Paint bytes on a canvas, one pixel each. */
function paint(canvas, shades, width) {
  canvas.width = width;
  canvas.height = shades.length / width;
  const image = new ImageData(width, canvas.height);
  const into = new Uint32Array(image.data.buffer);
  for (let i = 0; i < shades.length; i++) into[i] = pixels[shades[i]];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The hue of a label's type. The golden angle keeps neighbours in the list far apart. */
function hue(label) {
  return 30 + 137.508 * data.types.indexOf(label.replace(/^[BIESLU]-/, ""));
}

const percent = (p) => String(Math.round(100 * p));

/** The first and the last piece that are shown: all, or all but [CLS] and [SEP]. */
const first = () => (state.hide ? 1 : 0);
const last = () => (state.hide ? S - 2 : S - 1);
const visible = (i) => first() <= i && i <= last();

/** The bytes to paint: the map, or with state.scaled each row up to its largest visible weight. */
function shadesOf(map) {
  if (!state.scaled) return map;
  const scaled = new Uint8Array(S * S);
  for (let row = 0; row < S; row++) {
    const most = Math.max(1, ...map.subarray(row * S + first(), row * S + last() + 1));
    for (let i = row * S; i < (row + 1) * S; i++) {
      scaled[i] = Math.min(data.levels, Math.round((map[i] * data.levels) / most));
    }
  }
  return scaled;
}

// The address holds what is shown, so that a link opens the same view.

const RANGES = { layer: data.layers, head: data.heads, token: S };

/** The state that the address asks for; what is missing or wrong is as at the start. */
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const all = data.focus.flat();
  const best = all.indexOf(Math.max(...all));
  const found = { layer: Math.floor(best / data.heads), head: best % data.heads, token: data.start };
  for (const [name, count] of Object.entries(RANGES)) {
    const value = asked.get(name);
    if (/^\d+$/.test(value) && Number(value) < count) found[name] = Number(value);
  }
  found.way = asked.get("way") === "to" ? "to" : "from";
  for (const name of ["hide", "scaled"]) found[name] = asked.get(name) === "1";
  found.pinned = asked.has("token");
  return found;
}

let waiting = 0;

/** Write the state into the address, once it has been still for a moment. */
function toAddress() {
  clearTimeout(waiting);
  if (location.protocol === "about:") return; // within another page, which has the address
  waiting = setTimeout(() => {
    const shown = new URLSearchParams({ layer: state.layer, head: state.head });
    if (state.pinned) shown.set("token", state.token);
    if (state.way === "to") shown.set("way", "to");
    for (const name of ["hide", "scaled"]) if (state[name]) shown.set(name, "1");
    history.replaceState(null, "", `#${shown}`);
  }, 200);
}

// Drawing

function drawSentence() {
  const text = data.segments.map(([part]) => part).join("");
  document.title = `${text.length > 60 ? `${text.slice(0, 59)}…` : text} · minibert trace`;
  for (const [text, here, type, score] of data.segments) {
    const part = make(type === null ? "span" : "mark", here ? "" : "elsewhere", text);
    if (type !== null) {
      part.style.setProperty("--hue", hue(type));
      part.append(" ", make("small", "", `${type} ${score.toFixed(2)}`));
    }
    $("sentence").append(part);
  }
  $("sentence").classList.toggle("long", data.text_length > 240);
  $("facts").textContent = data.facts;
  $("window").textContent = data.window;
  $("window").hidden = !data.window;
  $("rounding").textContent = data.rounding;
}

function drawTokens() {
  data.pieces.forEach((piece, i) => {
    const inner = piece.startsWith("##") && i > 0;
    const button = make("button", inner ? "piece inner" : "piece", piece);
    button.type = "button";
    button.tabIndex = -1;
    button.ariaPressed = "false";
    button.dataset.index = i;
    button.title = `${piece}: word-piece ${i}, id ${data.ids[i]}`;
    $("tokens").append(button);
  });
}

function drawHeads() {
  const thumbs = bytes(data.thumbs);
  const area = data.thumb_size ** 2;
  $("heads").style.setProperty("--heads", data.heads);
  $("heads").replaceChildren(make("span"));
  for (let head = 0; head < data.heads; head++) $("heads").append(make("span", "", head));
  for (let layer = 0; layer < data.layers; layer++) {
    $("heads").append(make("span", "", layer));
    for (let head = 0; head < data.heads; head++) {
      const button = make("button");
      const canvas = make("canvas");
      const start = (layer * data.heads + head) * area;
      paint(canvas, thumbs.subarray(start, start + area), data.thumb_size);
      button.type = "button";
      button.ariaLabel = `Layer ${layer}, head ${head}`;
      button.title = `${button.ariaLabel}, focus ${data.focus[layer][head].toFixed(2)}`;
      button.dataset.layer = layer;
      button.dataset.head = head;
      button.append(canvas);
      $("heads").append(button);
    }
  }
}

/** The weight between the chosen token and another, in the chosen direction. */
function byteAt(other, bytes = map) {
  return state.way === "from" ? bytes[state.token * S + other] : bytes[other * S + state.token];
}

const shown = []; // the byte that each token shows, so that only changes touch the page

function shadeTokens() {
  const tokens = $("tokens").children;
  for (let i = 0; i < S; i++) {
    if (tokens[i].hidden === visible(i)) tokens[i].hidden = !visible(i);
    const byte = byteAt(i, shades);
    if (byte === shown[i]) continue;
    shown[i] = byte;
    tokens[i].style.setProperty("--shade", css(ramp[byte]));
    tokens[i].style.setProperty("--over", over(ramp[byte]));
  }
  for (const token of [...$("tokens").querySelectorAll(".now"), tokens[state.token]]) {
    const now = token === tokens[state.token];
    token.classList.toggle("now", now);
    token.classList.toggle("pinned", now && state.pinned);
    token.ariaPressed = String(now && state.pinned);
    token.tabIndex = now ? 0 : -1;
  }
}

/** The largest weights of the chosen token as bars, and one bar for the rest. */
function listStrongest() {
  const order = [...data.pieces.keys()].filter(visible).sort((a, b) => byteAt(b) - byteAt(a) || a - b).slice(0, 8);
  const row = (name, p) => {
    const item = make("li");
    const bar = make("span", "bar");
    bar.style.setProperty("--p", Math.min(1, p));
    item.append(name, bar, make("span", "value", p.toFixed(S > 64 ? 3 : 2)));
    return item;
  };
  const rows = order.map((i) => {
    const name = make("span", "name", data.pieces[i]);
    const twice = data.pieces.indexOf(data.pieces[i]) !== data.pieces.lastIndexOf(data.pieces[i]);
    if (twice) name.append(make("small", "", ` at ${i}`));
    return row(name, weight(byteAt(i)));
  });
  if (state.way === "from" && S > order.length && !state.hide) {
    const rest = 1 - order.reduce((sum, i) => sum + weight(byteAt(i)), 0);
    rows.push(row(make("span", "name rest", `${S - order.length} others`), Math.max(0, rest)));
  }
  $("strongest").replaceChildren(...rows);
  const way = state.way === "from" ? "attends to" : "is attended to by";
  const best = `${data.pieces[order[0]]}, ${weight(byteAt(order[0])).toFixed(2)}, most`;
  const name = make("span", "piece", data.pieces[state.token]);
  $("reading").replaceChildren(name, ` ${way} `, make("span", "hidden", best));
}

const grid = { cell: 1, left: 0, top: 0, count: S }; // position of the map on its canvas, in CSS pixels

/** The attention map, with the pieces along its sides if there is room. */
function drawMap() {
  const canvas = $("map");
  const room = Math.min(canvas.parentElement.clientWidth, 620);
  const style = getComputedStyle(document.documentElement);
  const pen = canvas.getContext("2d");
  const font = (cell) => `${Math.min(13, Math.max(9, cell * 0.6))}px ui-monospace, "DejaVu Sans Mono", monospace`;
  const count = (grid.count = last() - first() + 1);
  const pieces = data.pieces.slice(first(), last() + 1);
  pen.font = font(room / count);
  const measure = (piece) => pen.measureText(clipped(piece)).width;
  const widest = room / count < 11 ? room : Math.max(...pieces.map(measure));
  const labelled = (room - widest - 8) / count >= 11;
  grid.left = grid.top = labelled ? Math.ceil(widest) + 8 : 0;
  grid.cell = Math.min(48, (room - grid.left) / count);
  const size = grid.cell * count;
  const scale = devicePixelRatio;
  canvas.width = Math.round((grid.left + size) * scale);
  canvas.height = Math.round((grid.top + size) * scale);
  canvas.style.width = `${grid.left + size}px`;
  canvas.style.height = `${grid.top + size}px`;
  pen.scale(scale, scale);
  pen.imageSmoothingEnabled = grid.cell < 1;
  pen.drawImage(painted, first(), first(), count, count, grid.left, grid.top, size, size);
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(grid.left, grid.top, size, size);
  if (labelled) {
    pen.font = font(grid.cell);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pieces.forEach((piece, i) => {
      const at = (i + 0.5) * grid.cell;
      pen.fillStyle = style.getPropertyValue(i + first() === state.token ? "--mark" : "--ink");
      pen.fillText(clipped(piece), grid.left - 5, grid.top + at);
      pen.save();
      pen.translate(grid.left + at, grid.top - 5);
      pen.rotate(Math.PI / 2);
      pen.fillText(clipped(piece), 0, 0);
      pen.restore();
    });
  }
  pen.strokeStyle = style.getPropertyValue("--mark");
  pen.lineWidth = 2;
  const at = (state.token - first()) * grid.cell;
  const thick = Math.max(3, grid.cell);
  if (state.way === "from") pen.strokeRect(grid.left, grid.top + at, size, thick);
  else pen.strokeRect(grid.left + at, grid.top, thick, size);
}

const painted = document.createElement("canvas"); // the map, one pixel per weight
const clipped = (piece) => (piece.length > 12 ? piece.slice(0, 11) + "…" : piece);

function drawPredictions() {
  const table = $("predictions");
  const head = table.createTHead().insertRow();
  $("layers").hidden = data.predictions.length === 0;
  if ($("layers").hidden) return; // a model without a head
  const tagged = data.best.length === 0;
  const names = ["piece", "word", ...(tagged ? ["label"] : []), "embeddings", ...Array.from({ length: data.layers }, (_, i) => `layer ${i}`)];
  for (const name of names) {
    const cell = make("th", "", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  data.pieces.forEach((piece, i) => {
    const word = data.word_of[i];
    const starts = word !== null && data.word_of[i - 1] !== word;
    const row = body.insertRow();
    row.className = starts ? "" : word === null ? "unused" : "unused inner";
    const name = make("th", "piece", piece);
    name.scope = "row";
    row.append(name, make("td", "", starts ? data.words[word][0] : ""));
    if (tagged) row.append(starts ? labelled("label", data.words[word][1], data.words[word][2]) : make("td", "label"));
    const predicted = data.predictions.map((layer) => layer[i]);
    const final = predicted[predicted.length - 1][0];
    let settled = predicted.length - 1;
    while (settled > 0 && predicted[settled - 1][0] === final) settled--;
    predicted.forEach(([label, p], layer) => {
      const cell = labelled("", label, p);
      if (starts && final !== "O" && layer === settled) cell.classList.add("settles");
      if (!tagged) {
        cell.title = data.best[layer][i].map(([name, p]) => `${name} ${percent(p)}`).join("\n");
      }
      row.append(cell);
    });
  });
}

/** What each word would be labelled without each other one. */
function drawErased() {
  $("why").hidden = data.erased.length === 0;
  const table = $("erased");
  const head = table.createTHead().insertRow();
  const heading = (text, scope) => Object.assign(make("th", "piece", text), { scope });
  head.append(make("td"), ...data.words.map(([word]) => heading(word, "col")));
  const body = table.createTBody();
  const now = body.insertRow();
  now.append(heading("nothing erased", "row"), ...data.words.map(([, label, p]) => labelled("label", label, p)));
  data.erased.forEach((found, erased) => {
    const row = body.insertRow();
    row.append(heading(`without ${data.words[erased][0]}`, "row"));
    found.forEach((cell, word) => {
      const [, label, p] = data.words[word];
      if (cell === null) row.append(make("td", "word", "–"));
      else if (cell[0] !== label) row.append(labelled("changed", ...cell));
      else {
        const points = Math.round(100 * (cell[1] - p));
        row.append(make("td", "", points ? `${points > 0 ? "+" : "−"}${Math.abs(points)}` : ""));
      }
    });
  });
}

/** A cell with a label in its type's colour, or with a word-piece; opacity is the probability. */
function labelled(className, label, p) {
  const cell = make("td", `${className} ${label === "O" ? "none" : "predicted"}`, label);
  cell.style.setProperty("--hue", hue(label));
  cell.style.setProperty("--p", p);
  cell.append(" ", make("small", "", percent(p)));
  return cell;
}

// Changing what is shown

/** Change the token, the direction or the pin. */
function show(change) {
  Object.assign(state, change);
  if (!visible(state.token)) state.token = data.start;
  $("hide").checked = state.hide;
  $("scale-rows").checked = state.scaled;
  $("choice").elements.way.value = state.way;
  if ("hide" in change || "scaled" in change) repaint();
  toAddress();
  shadeTokens();
  listStrongest();
  drawMap();
}

function repaint() {
  shades = shadesOf(map);
  paint(painted, shades, S);
}

/** The heads of a layer in the list, the most focused first. */
function listHeads(layer) {
  const order = [...data.focus[layer].keys()].sort((a, b) => data.focus[layer][b] - data.focus[layer][a] || a - b);
  $("head").replaceChildren(...order.map((head) => new Option(`${head} (focus ${data.focus[layer][head].toFixed(2)})`, head)));
}

/** Change the head. Its map is inflated first; if the choice changed meanwhile, drop it. */
async function showHead(layer, head) {
  Object.assign(state, { layer, head });
  $("layer").value = layer;
  listHeads(layer);
  $("head").value = head;
  for (const button of $("heads").querySelectorAll("button")) {
    const chosen = Number(button.dataset.layer) === layer && Number(button.dataset.head) === head;
    button.ariaPressed = String(chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  const found = await inflate(data.maps[layer][head]);
  if (state.layer !== layer || state.head !== head) return;
  map = found;
  repaint();
  $("cell").textContent = "Point at a cell to read its weight.";
  $("map-title").textContent = `Layer ${layer}, head ${head}`;
  show({});
}

function recolour() {
  readRamp();
  shown.length = 0;
  paint($("ramp"), Uint8Array.from({ length: data.levels + 1 }, (_, i) => i), data.levels + 1);
  drawHeads();
  showHead(state.layer, state.head);
}

/** The index an arrow key moves to on a grid of this width; null for other keys. */
function step(key, at, width, count) {
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width }[key];
  const to = { Home: 0, End: count - 1 }[key] ?? (by === undefined ? null : at + by);
  return to === null ? null : Math.max(0, Math.min(count - 1, to));
}

function listen() {
  const indexOf = (event) => {
    const token = event.target.closest("[data-index]");
    return token && Number(token.dataset.index);
  };
  $("tokens").addEventListener("pointerover", (event) => {
    const token = indexOf(event);
    if (token !== null && !state.pinned) show({ token });
  });
  $("tokens").addEventListener("click", (event) => {
    const token = indexOf(event);
    if (token !== null) show({ token, pinned: !(state.pinned && token === state.token) });
  });
  $("tokens").addEventListener("keydown", (event) => {
    const to = step(event.key, state.token - first(), 1, last() - first() + 1);
    if (to === null) return;
    event.preventDefault();
    show({ token: to + first() });
    $("tokens").children[state.token].focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show({ pinned: false });
  });
  $("heads").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) showHead(Number(button.dataset.layer), Number(button.dataset.head));
  });
  $("heads").addEventListener("keydown", (event) => {
    const at = state.layer * data.heads + state.head;
    const to = step(event.key, at, data.heads, data.layers * data.heads);
    if (to === null) return;
    event.preventDefault();
    showHead(Math.floor(to / data.heads), to % data.heads);
    $("heads").querySelectorAll("button")[to].focus();
  });
  $("choice").addEventListener("change", (event) => {
    if (event.target.name === "way") show({ way: event.target.value });
    else if (event.target.id === "hide") show({ hide: event.target.checked });
    else if (event.target.id === "scale-rows") show({ scaled: event.target.checked });
    else showHead(Number($("layer").value), Number($("head").value));
  });
  $("map").addEventListener("pointermove", (event) => {
    const row = Math.floor((event.offsetY - grid.top) / grid.cell) + first();
    const column = Math.floor((event.offsetX - grid.left) / grid.cell) + first();
    const token = state.way === "from" ? row : column;
    if (visible(token) && token !== state.token && !state.pinned) show({ token });
    if (!visible(row) || !visible(column)) return;
    const value = weight(map[row * S + column]).toFixed(3);
    $("cell").textContent = `${data.pieces[row]} (${row}) attends to ${data.pieces[column]} (${column}): ${value}`;
  });
  addEventListener("hashchange", () => {
    const { layer, head, ...rest } = fromAddress();
    show(rest);
    showHead(layer, head);
  });
  new ResizeObserver(drawMap).observe($("map").parentElement);
  dark.addEventListener("change", recolour);
}

for (let layer = 0; layer < data.layers; layer++) $("layer").append(new Option(layer, layer));
Object.assign(state, fromAddress());
drawSentence();
drawTokens();
drawPredictions();
drawErased();
listen();
recolour();

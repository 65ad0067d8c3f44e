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
const state = { layer: 0, head: 0, token: data.start, way: "from", pinned: false };
let map = new Uint8Array(S * S); // of state.layer, state.head
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
  return 30 + 137.508 * data.types.indexOf(label.replace(/^[BI]-/, ""));
}

const percent = (p) => String(Math.round(100 * p));

// Drawing

function drawSentence() {
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
      const first = (layer * data.heads + head) * area;
      paint(canvas, thumbs.subarray(first, first + area), data.thumb_size);
      button.type = "button";
      button.ariaLabel = `Layer ${layer}, head ${head}`;
      button.title = button.ariaLabel;
      button.dataset.layer = layer;
      button.dataset.head = head;
      button.append(canvas);
      $("heads").append(button);
    }
  }
}

/** The weight between the chosen token and another, in the chosen direction. */
function byteAt(other) {
  return state.way === "from" ? map[state.token * S + other] : map[other * S + state.token];
}

const shown = []; // the byte that each token shows, so that only changes touch the page

function shadeTokens() {
  const tokens = $("tokens").children;
  for (let i = 0; i < S; i++) {
    const byte = byteAt(i);
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
  const order = [...data.pieces.keys()].sort((a, b) => byteAt(b) - byteAt(a) || a - b).slice(0, 8);
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
  if (state.way === "from" && S > order.length) {
    const rest = 1 - order.reduce((sum, i) => sum + weight(byteAt(i)), 0);
    rows.push(row(make("span", "name rest", `${S - order.length} others`), Math.max(0, rest)));
  }
  $("strongest").replaceChildren(...rows);
  const way = state.way === "from" ? "attends to" : "is attended to by";
  const best = `${data.pieces[order[0]]}, ${weight(byteAt(order[0])).toFixed(2)}, most`;
  const name = make("span", "piece", data.pieces[state.token]);
  $("reading").replaceChildren(name, ` ${way} `, make("span", "hidden", best));
}

const grid = { cell: 1, left: 0, top: 0 }; // position of the map on its canvas, in CSS pixels

/** The attention map, with the pieces along its sides if there is room. */
function drawMap() {
  const canvas = $("map");
  const room = Math.min(canvas.parentElement.clientWidth, 620);
  const style = getComputedStyle(document.documentElement);
  const pen = canvas.getContext("2d");
  const font = (cell) => `${Math.min(13, Math.max(9, cell * 0.6))}px ui-monospace, "DejaVu Sans Mono", monospace`;
  pen.font = font(room / S);
  const measure = (piece) => pen.measureText(clipped(piece)).width;
  const widest = room / S < 11 ? room : Math.max(...data.pieces.map(measure));
  const labelled = (room - widest - 8) / S >= 11;
  grid.left = grid.top = labelled ? Math.ceil(widest) + 8 : 0;
  grid.cell = Math.min(48, (room - grid.left) / S);
  const size = grid.cell * S;
  const scale = devicePixelRatio;
  canvas.width = Math.round((grid.left + size) * scale);
  canvas.height = Math.round((grid.top + size) * scale);
  canvas.style.width = `${grid.left + size}px`;
  canvas.style.height = `${grid.top + size}px`;
  pen.scale(scale, scale);
  pen.imageSmoothingEnabled = grid.cell < 1;
  pen.drawImage(painted, grid.left, grid.top, size, size);
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(grid.left, grid.top, size, size);
  if (labelled) {
    pen.font = font(grid.cell);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    data.pieces.forEach((piece, i) => {
      const at = (i + 0.5) * grid.cell;
      pen.fillStyle = style.getPropertyValue(i === state.token ? "--mark" : "--ink");
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
  const at = state.token * grid.cell;
  const thick = Math.max(3, grid.cell);
  if (state.way === "from") pen.strokeRect(grid.left, grid.top + at, size, thick);
  else pen.strokeRect(grid.left + at, grid.top, thick, size);
}

const painted = document.createElement("canvas"); // the map, one pixel per weight
const clipped = (piece) => (piece.length > 12 ? piece.slice(0, 11) + "…" : piece);

function drawPredictions() {
  const table = $("predictions");
  const head = table.createTHead().insertRow();
  const names = ["piece", "word", "embeddings", ...Array.from({ length: data.layers }, (_, i) => `layer ${i}`), "label"];
  for (const name of names) {
    const cell = make("th", "", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  data.pieces.forEach((piece, i) => {
    const word = data.word_of[i];
    const first = word !== null && data.word_of[i - 1] !== word;
    const row = body.insertRow();
    row.className = first ? "" : word === null ? "unused" : "unused inner";
    const name = make("th", "piece", piece);
    name.scope = "row";
    row.append(name, make("td", "", first ? data.words[word][0] : ""));
    const predicted = data.predictions.map((layer) => layer[i]);
    const last = predicted[predicted.length - 1][0];
    let settled = predicted.length - 1;
    while (settled > 0 && predicted[settled - 1][0] === last) settled--;
    predicted.forEach(([label, p], layer) => {
      const cell = labelled("", label, p);
      if (first && last !== "O" && layer === settled) cell.classList.add("settles");
      row.append(cell);
    });
    row.append(first ? labelled("label", data.words[word][1], data.words[word][2]) : make("td", "label"));
  });
}

/** A cell with a label in its type's colour; opacity is the probability. */
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
  shadeTokens();
  listStrongest();
  drawMap();
}

/** Change the head. Its map is inflated first; if the choice changed meanwhile, drop it. */
async function showHead(layer, head) {
  Object.assign(state, { layer, head });
  $("layer").value = layer;
  $("head").value = head;
  for (const button of $("heads").querySelectorAll("button")) {
    const chosen = Number(button.dataset.layer) === layer && Number(button.dataset.head) === head;
    button.ariaPressed = String(chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  const found = await inflate(data.maps[layer][head]);
  if (state.layer !== layer || state.head !== head) return;
  map = found;
  paint(painted, map, S);
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
    const to = step(event.key, state.token, 1, S);
    if (to === null) return;
    event.preventDefault();
    show({ token: to });
    $("tokens").children[to].focus();
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
    else showHead(Number($("layer").value), Number($("head").value));
  });
  $("map").addEventListener("pointermove", (event) => {
    const along = state.way === "from" ? event.offsetY - grid.top : event.offsetX - grid.left;
    const token = Math.floor(along / grid.cell);
    if (token >= 0 && token < S && token !== state.token && !state.pinned) show({ token });
  });
  new ResizeObserver(drawMap).observe($("map").parentElement);
  dark.addEventListener("change", recolour);
}

for (let layer = 0; layer < data.layers; layer++) $("layer").append(new Option(layer, layer));
for (let head = 0; head < data.heads; head++) $("head").append(new Option(head, head));
drawSentence();
drawTokens();
drawPredictions();
listen();
recolour();

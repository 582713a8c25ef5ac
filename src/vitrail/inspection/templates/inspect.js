"use strict";
// Interactive attention: maps come as bytes, scaled to the largest share of each row, which is kept beside them.
(() => {
  const AMBER = "255,176,46", ASKED = "#6fb4ff";
  const widgets = [];

  const unpack = (text, Kind) => {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Kind(bytes.buffer);
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const size = (cells) => cells.grid[0] * cells.grid[1] * cells.grid[2];
  const centre = (cells, token) => {
    const [, h, w] = cells.grid, i = token - cells.prefix;
    return [Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w].map((n, a) => cells.origin[a] + n * cells.step[a]);
  };

  function open(layer) {
    if (layer.open) return layer;
    Object.assign(layer, {
      open: true, rows: unpack(layer.rows, Int32Array), keys: unpack(layer.keys, Int32Array),
      shares: unpack(layer.shares, Uint8Array), peaks: unpack(layer.peaks, Float32Array), of: new Map(),
    });
    for (let r = 0; r < layer.rows.length / 2; r++) {
      const token = layer.rows[2 * r];
      if (!layer.of.has(token)) layer.of.set(token, []);
      layer.of.get(token).push(r);
    }
    return layer;
  }

  // The token of a layer whose cell a place lies in; where only some may be asked, the nearest of them.
  function tokenAt(layer, place) {
    const cells = layer.asking;
    if (!size(cells)) return 0;
    const at = place.map((p, a) => clamp(Math.round((p - cells.origin[a]) / cells.step[a]), 0, cells.grid[a] - 1));
    const token = cells.prefix + (at[0] * cells.grid[1] + at[1]) * cells.grid[2] + at[2];
    if (layer.of.has(token)) return token;
    let best = null, least = Infinity;
    for (const other of layer.of.keys()) {
      if (other < cells.prefix) continue;
      const c = centre(cells, other);
      const apart = Math.hypot(...c.map((v, a) => (v - place[a]) / cells.step[a]));
      if (apart < least) [best, least] = [other, apart];
    }
    return best;
  }

  function weightsOf(layer, token, head) {
    const found = new Float64Array(layer.cells.prefix + size(layer.cells)), rows = layer.of.get(token) || [];
    const heads = head < 0 ? [...Array(layer.heads).keys()] : [head], count = layer.rows.length / 2;
    for (const r of rows) for (const k of heads) {
      const peak = layer.peaks[k * count + r] / 255 / rows.length / heads.length;
      const keys = layer.rows[2 * r + 1] * layer.width, start = (k * count + r) * layer.width;
      for (let j = 0; j < layer.width; j++) {
        const key = layer.keys[keys + j];
        if (key >= 0) found[key] += peak * layer.shares[start + j];
      }
    }
    return found;
  }

  function make(root) {
    const data = JSON.parse(root.querySelector("script").textContent), [frames, height, width] = data.sides;
    const pick = (name) => root.querySelector(`.${name}`);
    const canvas = pick("canvas"), ink = canvas.getContext("2d"), tiles = data.frames.length;
    const across = Math.min(tiles, 4), zoom = Math.max(1, Math.round((tiles > 1 ? 190 : 440) / width));
    const gap = tiles > 1 ? 4 : 0, tileW = width * zoom, tileH = height * zoom;
    canvas.width = across * (tileW + gap) - gap;
    canvas.height = Math.ceil(tiles / across) * (tileH + gap) - gap;
    const state = { place: [frames / 2, height / 2, width / 2], token: null };
    const corner = (tile) => [(tile % across) * (tileW + gap), Math.floor(tile / across) * (tileH + gap)];
    const tileOf = (frame) => clamp(Math.floor(frame / (frames / tiles)), 0, tiles - 1);
    // The outermost cells reach to the border of the picture: every pixel belongs to the nearest cell.
    const side = (cells, axis, at, end) => {
      const low = at - cells.step[axis] / 2, high = at + cells.step[axis] / 2, half = cells.step[axis] / 2;
      const first = at - cells.origin[axis] < half, last = at - cells.origin[axis] > (cells.grid[axis] - 1.5) * cells.step[axis];
      return [first ? 0 : clamp(low, 0, end), last ? end : clamp(high, 0, end)];
    };
    const box = (cells, token) => {
      const [t, y, x] = centre(cells, token), [y0, y1] = side(cells, 1, y, height), [x0, x1] = side(cells, 2, x, width);
      return { tile: tileOf(t), x: x0, y: y0, w: x1 - x0, h: y1 - y0 };
    };
    // The frames shown that lie nearest to a cell's time, or the one that it lies in.
    const tilesOf = (cells, token) => {
      const t = Math.floor((token - cells.prefix) / (cells.grid[1] * cells.grid[2])), found = [];
      for (let tile = 0; tile < tiles; tile++) {
        const at = ((tile + 0.5) * frames) / tiles;
        if (clamp(Math.floor((at - cells.origin[0]) / cells.step[0] + 0.5), 0, cells.grid[0] - 1) === t) found.push(tile);
      }
      return found.length ? found : [tileOf(centre(cells, token)[0])];
    };

    data.layers.forEach((layer, i) => pick("layer").add(new Option(`${i + 1} · ${layer.name}`, i)));
    pick("layer").max = data.layers.length - 1;

    function heads() {
      const layer = open(data.layers[pick("layer").value]), before = pick("head").value;
      pick("head").replaceChildren(new Option("mean of heads", -1));
      for (let k = 0; k < layer.heads; k++) pick("head").add(new Option(`head ${k + 1}`, k));
      pick("head").value = before !== "" && Number(before) < layer.heads ? before : -1;
      pick("tokens").replaceChildren(...layer.tokens.map((name, token) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name;
        button.addEventListener("click", () => { state.token = token; draw(); });
        return button;
      }));
      if (state.token !== null && state.token >= layer.asking.prefix) state.token = null;
      if (!size(layer.asking)) state.token = 0;
    }

    function draw() {
      const layer = open(data.layers[pick("layer").value]), head = Number(pick("head").value), cells = layer.cells;
      const token = state.token === null ? tokenAt(layer, state.place) : state.token;
      const weights = weightsOf(layer, token, head), placed = weights.subarray(cells.prefix);
      let top = 0, brightest = 0, away = 0, total = 0;
      weights.forEach((v, i) => { total += v; if (i < cells.prefix) away += v; else if (v > top) [top, brightest] = [v, i]; });
      ink.fillStyle = "#000";
      ink.globalAlpha = 1;
      ink.clearRect(0, 0, canvas.width, canvas.height);
      ink.imageSmoothingEnabled = width > 64;
      for (let tile = 0; tile < tiles; tile++) {
        const [left, y] = corner(tile);
        ink.globalAlpha = 1;
        ink.fillRect(left, y, tileW, tileH);
        ink.globalAlpha = 0.22;
        ink.drawImage(pictures[tile], left, y, tileW, tileH);
      }
      placed.forEach((v, i) => {
        const light = top ? v / top : 0;
        if (light < 0.004) return;
        const b = box(cells, i + cells.prefix);
        for (const tile of tilesOf(cells, i + cells.prefix)) {
          const picture = pictures[tile], [left, y] = corner(tile);
          const sx = picture.naturalWidth / width, sy = picture.naturalHeight / height;
          const place = [left + b.x * zoom, y + b.y * zoom, b.w * zoom, b.h * zoom];
          ink.globalAlpha = light;
          ink.drawImage(picture, b.x * sx, b.y * sy, b.w * sx, b.h * sy, ...place);
          ink.globalAlpha = 0.3 * light;
          ink.fillStyle = `rgb(${AMBER})`;
          ink.fillRect(...place);
          ink.fillStyle = "#000";
        }
      });
      ink.globalAlpha = 1;
      let asks = layer.tokens[token];
      if (token >= layer.asking.prefix && size(layer.asking)) {
        const b = box(layer.asking, token), [t, y, x] = centre(layer.asking, token), [left, top] = corner(b.tile);
        ink.strokeStyle = ASKED;
        ink.lineWidth = 2;
        ink.strokeRect(left + b.x * zoom + 1, top + b.y * zoom + 1, Math.max(b.w * zoom - 2, 3), Math.max(b.h * zoom - 2, 3));
        asks = `the patch at ${Math.round(x)}, ${Math.round(y)}` + (frames > 1 ? ` around frame ${Math.round(t + 0.5)}` : "");
      }
      const percent = (v) => `${(100 * v).toFixed(v < 0.0995 ? 1 : 0)} %`;
      let said = `Asked: ${asks}. The brightest pane gets ${percent(top)}`;
      if (away > 0) said += `; ${percent(away)} go to tokens without a place`;
      pick("said").textContent = `${said}.`;
      [...pick("tokens").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === token)));
      Object.assign(root.dataset, { asked: token, brightest, top: top.toFixed(4), total: total.toFixed(3) });
    }

    const moved = (place) => { state.place = place; state.token = null; if (!size(data.layers[pick("layer").value].asking)) state.token = 0; draw(); };
    const at = (event) => {
      const shown = canvas.getBoundingClientRect(), ratio = canvas.width / shown.width;
      const x = (event.clientX - shown.left) * ratio, y = (event.clientY - shown.top) * ratio;
      const column = clamp(Math.floor(x / (tileW + gap)), 0, across - 1), row = Math.floor(y / (tileH + gap));
      const tile = clamp(row * across + column, 0, tiles - 1), [left, top] = corner(tile);
      return [((tile + 0.5) * frames) / tiles, clamp((y - top) / zoom, 0, height - 1e-3), clamp((x - left) / zoom, 0, width - 1e-3)];
    };
    const tell = (place) => {
      const share = [place[0] / frames, place[1] / height, place[2] / width];
      widgets.filter((w) => w.sample === root.dataset.sample).forEach((w) => w.move(share));
    };
    canvas.addEventListener("pointermove", (event) => tell(at(event)));
    canvas.addEventListener("pointerdown", (event) => tell(at(event)));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [1, -1], ArrowDown: [1, 1], ArrowLeft: [2, -1], ArrowRight: [2, 1], PageUp: [0, -1], PageDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const cells = data.layers[pick("layer").value].asking, limits = data.sides, place = [...state.place];
      place[step[0]] = clamp(place[step[0]] + step[1] * cells.step[step[0]], 0, limits[step[0]] - 1e-3);
      tell(place);
    });
    pick("layer").addEventListener("change", () => { heads(); draw(); });
    pick("head").addEventListener("change", draw);

    let waiting = tiles;
    const pictures = data.frames.map((source) => {
      const picture = new Image();
      picture.addEventListener("load", () => {
        if (--waiting) return;
        pick("layer").value = data.layers.length - 1;
        heads();
        if (open(data.layers[data.layers.length - 1]).asking.prefix) state.token = 0;
        draw();
      });
      picture.src = source;
      return picture;
    });
    widgets.push({ sample: root.dataset.sample, move: (s) => moved([s[0] * frames, s[1] * height, s[2] * width]) });
  }
  document.querySelectorAll(".hover").forEach(make);
})();

'use strict';
// Starts OpenSeadragon on the pictures in this page and draws over it what each tile adds. Without it the sheet stays where it is.
const element = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const taken = id => {
  const block = element(id), content = block.textContent;
  block.remove();
  return content;
};
const bytes = content => Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
const said = JSON.parse(taken('viewer-facts'));
const screen = element('viewer-screen');
const MOST_CELLS = 4096 * 4096;
const CLOSE = 60;  // pixels of a tile on the screen

const pictures = [];
let viewer, over, raster, finest, sharp = false, full = 0, layer = String(said.predicted), pointer = null, cross = null, current = null;

// ---- where things are: micrometres from the slide's top left corner; OpenSeadragon's unit is the width of the slide

const point = (x, y) => new OpenSeadragon.Point(x / said.width, y / said.width);
const onScreen = (x, y) => viewer.viewport.pixelFromPoint(point(x, y), true);
const onePixel = () => onScreen(1, 0).x - onScreen(0, 0).x;
const micrometres = pixel => {
  const at = viewer.viewport.pointFromPixel(pixel, true);
  return {x: at.x * said.width, y: at.y * said.width};
};

const tiles = (() => {
  const values = new Float32Array(bytes(taken('viewer-tiles')).buffer), part = n => values.subarray(n * said.count, (n + 1) * said.count);
  const [x, y, column, row, attention] = [0, 1, 2, 3, 4].map(part);
  const shares = said.classes.map((_, n) => part(5 + n)), at = new Map();
  for (let n = 0; n < said.count; n++) at.set(`${column[n]} ${row[n]}`, n);
  return {x, y, attention, shares, at};
})();

// of tiles that overlap, the one whose middle is nearest
function tileAt({x, y}) {
  const [column, row] = [x, y].map(um => Math.round((um - said.side / 2) / said.step));
  const n = tiles.at.get(`${column} ${row}`);
  return n !== undefined && x >= tiles.x[n] && x < tiles.x[n] + said.side && y >= tiles.y[n] && y < tiles.y[n] + said.side ? n : null;
}

// ---- start

async function loadOpenSeadragon() {
  if (!window.DecompressionStream) throw Error('This browser is too old for the viewer.');
  const stream = new Blob([bytes(taken('viewer-openseadragon'))]).stream().pipeThrough(new DecompressionStream('gzip'));
  const script = document.createElement('script');
  script.textContent = await new Response(stream).text();  // the page's policy knows its hash, and runs no other
  // OpenSeadragon adds a rule for phones unless it finds it; the policy would refuse it, and complain
  document.querySelector('style').setAttribute('data-openseadragon-mobile-css', 'true');
  document.head.append(script);
}

function slide(levels) {
  const last = levels[levels.length - 1], pictures = levels.map(level => level.pictures);
  finest = last.width;
  const source = new OpenSeadragon.TileSource({
    width: last.width, height: last.height, tileSize: said.tile, tileOverlap: 0, minLevel: 0, maxLevel: levels.length - 1, ready: true,
  });
  source.getLevelScale = level => levels[level].width / finest;
  source.getNumTiles = level => new OpenSeadragon.Point(...['width', 'height'].map(side => Math.ceil(levels[level][side] / said.tile)));
  source.tileExists = (level, x, y) => `${x}_${y}` in pictures[level];
  source.getTileUrl = (level, x, y) => `data:image/jpeg;base64,${pictures[level][`${x}_${y}`]}`;
  return source;
}

async function start() {
  await loadOpenSeadragon();
  const drawn = new Promise((done, failed) => setTimeout(() => {
    viewer.addOnceHandler('open', done);
    viewer.addOnceHandler('open-failed', event => failed(Error(event.message)));
  }));
  viewer = OpenSeadragon({
    element: screen, tileSources: [slide(JSON.parse(taken('viewer-levels')))], drawer: 'canvas', showNavigationControl: false,
    showNavigator: true, navigatorSizeRatio: 0.16, navigatorPosition: 'TOP_RIGHT', navigatorAutoFade: false, animationTime: 0.4, maxZoomPixelRatio: 24,
    visibilityRatio: 0.3, smoothTileEdgesMinZoom: 0, minZoomImageRatio: 0.7, gestureSettingsMouse: {clickToZoom: false, dblClickToZoom: true},
    placeholderFillStyle: '#f1f0f2',
  });
  await drawn;
  over = screen.appendChild(Object.assign(document.createElement('canvas'), {className: 'over'}));
  for (const figure of all('[data-tile]').reverse()) addPicture(figure);  // the first lies on top
  wire();
  setLayer(layer);
  viewer.addHandler('update-viewport', draw);
  viewer.addHandler('animation', () => sharpen(false));
  document.body.dataset.viewer = 'ready';
}

// a top tile at its own resolution, where it lies; seen only from where the whole slide's pictures are too coarse
function addPicture(figure) {
  const n = Number(figure.dataset.tile), place = point(tiles.x[n], tiles.y[n]);
  viewer.addTiledImage({
    tileSource: {type: 'image', url: figure.querySelector('img').src}, x: place.x, y: place.y, width: said.side / said.width,
    opacity: 0, preload: true, success: event => pictures.push(event.item) && sharpen(true),
  });
}

function sharpen(anew) {
  const close = onePixel() * said.width / finest > 1;
  if (close === sharp && !anew) return;
  sharp = close;
  for (const picture of pictures) picture.setOpacity(sharp ? 1 : 0);
}

// ---- the heat: a cell for each tile (four by four where tiles overlap), drawn without smoothing

const values = () => layer === 'attention' ? tiles.attention : tiles.shares[Number(layer)];

function setLayer(key) {
  layer = key;
  for (const button of all('[data-layer]')) button.setAttribute('aria-pressed', button.dataset.layer === key);
  full = values().reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  rasterise();
  tell();
}

function rasterise() {
  const um = said.step / (said.side === said.step ? 1 : 4), [width, height] = [said.width, said.height].map(side => Math.ceil(side / um));
  if (width * height > MOST_CELLS) return giveUp(Error('The slide has too many tiles.'));
  const sums = new Float32Array(width * height), counts = new Uint8Array(width * height), shown = values();
  for (let n = 0; n < said.count; n++) {
    const [left, top] = [tiles.x[n], tiles.y[n]].map(at => Math.round(at / um)), cells = Math.max(1, Math.round(said.side / um));
    for (let y = top; y < Math.min(top + cells, height); y++) for (let x = left; x < Math.min(left + cells, width); x++) {
      sums[y * width + x] += shown[n];
      counts[y * width + x]++;
    }
  }
  raster = Object.assign(document.createElement('canvas'), {width, height});
  raster.um = um;
  raster.values = sums.map((sum, n) => counts[n] ? sum / counts[n] : 0);
  colour();
}

function colour() {
  const context = raster.getContext('2d'), picture = context.createImageData(raster.width, raster.height), least = Number(element('viewer-least').value);
  raster.values.forEach((value, n) => {
    const level = full ? value / full : 0, strength = Math.abs(level);
    if (strength < least || !strength) return;
    const tone = toneOf(level < 0 ? said.tones.contra : said.tones.pro, strength);
    picture.data.set([...tone, 255 * Math.min(1, strength / said.fullFrom)], 4 * n);
  });
  context.putImageData(picture, 0, 0);
  legend(least * full);
  viewer.forceRedraw();
  draw();
}

function toneOf(tones, strength) {
  const at = strength * (tones.length - 1), low = Math.min(Math.floor(at), tones.length - 2);
  return tones[low].map((value, channel) => value + (tones[low + 1][channel] - value) * (at - low));
}

function legend(least) {
  const signed = layer !== 'attention';
  element('viewer-bar').className = signed ? 'bar signed' : 'bar';
  element('viewer-ends').replaceChildren(...(signed ? [-full, 0, full] : [0, full]).map(end => span(signed ? number(end) : figures(end))));
  const what = signed ? `logits that a tile adds to ${said.classes[Number(layer)]}` : 'of the attention, which sums to 1';
  element('viewer-unit').textContent = `${what}; clear below ${figures(least)}`;
}

const span = words => Object.assign(document.createElement('span'), {textContent: words});
const figures = value => String(Number(value.toPrecision(3)));
const number = value => (value > 0 ? '+' : value < 0 ? '−' : '') + figures(Math.abs(value));

// ---- drawing over the slide

function draw() {
  const ratio = window.devicePixelRatio, context = over.getContext('2d'), wide = screen.clientWidth, high = screen.clientHeight;
  if (over.width !== Math.round(wide * ratio) || over.height !== Math.round(high * ratio)) Object.assign(over, {width: wide * ratio, height: high * ratio});
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, wide, high);
  if (element('viewer-heat').checked) drawHeat(context, wide, high);
  if (element('viewer-marks').checked) drawMarks(context);
  drawHovered(context);
  if (element('viewer-crosshair').checked && cross) drawCross(context, wide, high);
  drawScale(context, high);
}

// only the cells in sight: far in, the whole would be a picture of a million pixels across
function drawHeat(context, wide, high) {
  const first = micrometres(new OpenSeadragon.Point(0, 0)), last = micrometres(new OpenSeadragon.Point(wide, high));
  const [left, top] = [first.x, first.y].map(um => Math.max(0, Math.floor(um / raster.um)));
  const right = Math.min(raster.width, Math.ceil(last.x / raster.um)), bottom = Math.min(raster.height, Math.ceil(last.y / raster.um));
  if (right <= left || bottom <= top) return;
  const begin = onScreen(left * raster.um, top * raster.um), end = onScreen(right * raster.um, bottom * raster.um);
  const edge = onScreen(said.width, said.height);
  context.save();
  context.beginPath();
  context.rect(0, 0, edge.x, edge.y);
  context.clip();
  // from the size on at which cells can be told apart, heat gives way to them
  const side = said.side * onePixel();
  context.globalAlpha = Number(element('viewer-strength').value) * Math.min(1, Math.max(0.2, CLOSE / side));
  context.imageSmoothingEnabled = false;
  context.drawImage(raster, left, top, right - left, bottom - top, begin.x, begin.y, end.x - begin.x, end.y - begin.y);
  context.restore();
}

function square(context, n, tone, width) {
  const begin = onScreen(tiles.x[n], tiles.y[n]), end = onScreen(tiles.x[n] + said.side, tiles.y[n] + said.side);
  for (const [style, line] of [['rgba(255,255,255,.9)', width + 1.5], [tone, width]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.strokeRect(begin.x, begin.y, end.x - begin.x, end.y - begin.y);
  }
  return {begin, side: end.x - begin.x};
}

function drawMarks(context) {
  context.font = '600 12px system-ui, sans-serif';
  for (const figure of all('[data-tile]').reverse()) {
    const tone = `rgb(${said.marks[figure.dataset.kind]})`, {begin, side} = square(context, Number(figure.dataset.tile), tone, figure === current ? 4 : 2);
    if (side > 30) words(context, figure.dataset.rank, begin.x + 5, begin.y + 15, '#16191d');
  }
}

function words(context, said, x, y, tone) {
  context.lineWidth = 3;
  context.strokeStyle = 'rgba(255,255,255,.9)';
  context.strokeText(said, x, y);
  context.fillStyle = tone;
  context.fillText(said, x, y);
}

function drawHovered(context) {
  const n = pointer && tileAt(pointer);
  if (n !== null) square(context, n, '#16191d', 1);
}

function drawCross(context, wide, high) {
  const {x, y} = onScreen(cross.x, cross.y), gap = 10;
  for (const [style, line] of [['rgba(255,255,255,.7)', 3], ['rgba(20,24,30,.85)', 1]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.beginPath();
    for (const [from, to] of [[[0, y], [x - gap, y]], [[x + gap, y], [wide, y]], [[x, 0], [x, y - gap]], [[x, y + gap], [x, high]]]) {
      context.moveTo(...from);
      context.lineTo(...to);
    }
    context.stroke();
  }
}

function drawScale(context, high) {
  const perMicrometre = onePixel(), most = 160 / perMicrometre, power = 10 ** Math.floor(Math.log10(most));
  const um = [5, 2, 1].map(digit => digit * power).find(length => length <= most), length = um * perMicrometre, y = high - 18;
  context.font = '13px system-ui, sans-serif';
  for (const [style, line] of [['rgba(255,255,255,.9)', 5], ['#16191d', 2]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.beginPath();
    for (const [a, b, c, d] of [[16, y, 16 + length, y], [16, y - 5, 16, y + 5], [16 + length, y - 5, 16 + length, y + 5]]) {
      context.moveTo(a, b);
      context.lineTo(c, d);
    }
    context.stroke();
  }
  words(context, um >= 1000 ? `${um / 1000} mm` : `${um} µm`, 16 + length + 10, y + 4, '#16191d');
}

// ---- what lies under the pointer, or the crosshair

function tell() {
  const at = pointer ?? cross;
  if (!at) return;
  const spoken = [`x ${at.x.toFixed(0)}, y ${at.y.toFixed(0)} µm`], n = tileAt(at);
  if (n === null) spoken.push('no tile');
  else {
    said.classes.forEach((name, c) => spoken.push(`${number(tiles.shares[c][n])} to ${name}`));
    spoken.push(`attention ${figures(tiles.attention[n])}`);
  }
  element('viewer-place').textContent = spoken.join(' · ');
}

function jump(figure) {
  for (const other of all('[data-tile][aria-current]')) other.removeAttribute('aria-current');
  figure.setAttribute('aria-current', 'true');
  current = figure;
  const n = Number(figure.dataset.tile), side = 5 * said.side;  // with its neighbours
  pointer = null;
  cross = {x: tiles.x[n] + said.side / 2, y: tiles.y[n] + said.side / 2};
  const corner = point(cross.x - side / 2, cross.y - side / 2);
  viewer.viewport.fitBounds(new OpenSeadragon.Rect(corner.x, corner.y, side / said.width, side / said.width));
  tell();
  const box = screen.getBoundingClientRect();
  if (box.top < 0 || box.bottom > innerHeight) screen.scrollIntoView({block: 'start'});
}

// ---- controls

function wire() {
  const sounds = (id, act) => element(id).addEventListener('input', act);
  for (const id of ['viewer-heat', 'viewer-marks', 'viewer-crosshair', 'viewer-strength']) sounds(id, draw);
  sounds('viewer-least', colour);
  sounds('viewer-grey', () => screen.classList.toggle('grey', element('viewer-grey').checked));
  const presses = (id, act) => element(id).addEventListener('click', act);
  presses('viewer-whole', () => viewer.viewport.goHome());
  presses('viewer-closer', () => viewer.viewport.zoomBy(2));
  presses('viewer-farther', () => viewer.viewport.zoomBy(0.5));
  for (const button of all('[data-layer]')) button.addEventListener('click', () => setLayer(button.dataset.layer));
  for (const figure of all('[data-tile]')) figure.addEventListener('click', () => jump(figure));
  viewer.addHandler('canvas-click', event => {
    if (!event.quick) return;
    cross = micrometres(event.position);
    tell();
    draw();
  });
  screen.addEventListener('pointermove', event => {
    const box = screen.getBoundingClientRect();
    pointer = micrometres(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
    tell();
    draw();
  });
  screen.addEventListener('pointerleave', () => {
    pointer = null;
    tell();
    draw();
  });
  viewer.addHandler('canvas-key', event => { event.preventDefaultAction = true; });  // its letters turn and mirror the slide
  document.addEventListener('keydown', press);
}

function press(event) {
  const focused = event.target.closest('[data-tile]');
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Enter' && focused) jump(focused);
  else if (event.key === 'n' || event.key === 'p') next(event.key === 'n' ? 1 : -1);
  else document.querySelector(`:is(input, button)[data-key="${CSS.escape(event.key)}"]`)?.click();
}

function next(by) {
  const figures = all('[data-tile]'), at = figures.indexOf(current);
  if (figures.length) jump(figures[(at + by + figures.length + (at < 0 && by < 0 ? 1 : 0)) % figures.length]);
}

function giveUp(reason) {
  element('viewer').hidden = true;
  element('viewer-sorry').hidden = false;
  element('viewer-why').textContent = reason.message;
  element('picture').open = true;
  document.body.dataset.viewer = 'none';
}

element('viewer').hidden = false;
element('picture').open = false;
start().catch(giveUp);

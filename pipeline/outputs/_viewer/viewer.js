'use strict';
// Starts NiiVue on the volumes in this page and ties the controls to it. Without WebGL2 the picture stays where it is.
const element = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const said = JSON.parse(element('viewer-facts').textContent);
const canvas = element('viewer-canvas');
const HIDDEN = 0.0001;  // an opacity of 0 would take the outline along
const TONES = {inferno: said.heat.positive, pro: said.heat.pro, contra: said.heat.contra};
const SIDES = [['R', 'L'], ['A', 'P'], ['S', 'I']];
const KEYS = {
  ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1],
};

let nv, scan, labels, drawnLabels, map = null;
const maps = new Map(), hidden = new Set();

const bytes = id => {
  const block = element(id), packed = Uint8Array.from(atob(block.textContent), letter => letter.charCodeAt(0));
  block.remove();
  return packed;
};

async function loadNiiVue() {
  if (!window.DecompressionStream) throw Error('This browser is too old for the viewer.');
  const probe = document.createElement('canvas').getContext('webgl2');
  if (!probe) throw Error('This browser shows no WebGL2, which the viewer needs.');
  probe.getExtension('WEBGL_lose_context')?.loseContext();
  const stream = new Blob([bytes('viewer-niivue')]).stream().pipeThrough(new DecompressionStream('gzip'));
  const script = document.createElement('script');
  script.textContent = await new Response(stream).text();  // the page's policy knows its hash, and runs no other
  document.head.append(script);
}

async function start() {
  await loadNiiVue();
  nv = new niivue.Niivue({
    isRadiologicalConvention: true, isSliceMM: true, dragAndDropEnabled: false, logLevel: 'error', scrollRequiresFocus: true,
    crosshairColor: [1, 1, 1, 0.6], crosshairWidthUnit: 'percent', crosshairWidth: thin(), crosshairGap: 4,
    dragMode: niivue.DRAG_MODE.windowing, fontMinPx: 14, fontColor: [0.8, 0.8, 0.8, 1], showAllOrientationMarkers: true,
    onLocationChange: tell, onIntensityChange: volume => volume === scan && showWindow(),
  });
  await nv.attachToCanvas(canvas);
  for (const [name, tones] of Object.entries(TONES)) nv.addColormap(name, gradient(tones));
  scan = await volume('viewer-scan', 'scan', 'gray', 1, ...said.window);
  labels = await volume('viewer-labels', 'labels', 'gray', HIDDEN, NaN, NaN);
  drawnLabels = labels.img.slice();
  const first = document.querySelector('.layers [data-first]');
  if (first) await load(map = Number(first.dataset.map));
  once(() => {
    nv.addVolume(scan);
    if (first) nv.addVolume(maps.get(map));
    nv.addVolume(labels);  // last: its outline stays in sight
    drawLabels();
    drawMap();
  });
  wire();
  setView(element('viewer-views').querySelector('[aria-pressed=true]'));
  go(said.start);
  document.body.dataset.viewer = 'ready';
}

// per cent of the picture: a pixel and a half, at least
const thin = () => Math.max(0.2, 150 / canvas.clientWidth);

// NiiVue builds its textures anew after every change: seconds of a large scan where there is no graphics card
function once(changes) {
  nv.updateGLVolume = () => {};
  try { changes(); } finally { delete nv.updateGLVolume; }
  nv.updateGLVolume();
}

const volume = (id, name, colours, opacity, low, high) =>
  niivue.NVImage.new(bytes(id).buffer, `${name}.nii.gz`, colours, opacity, null, low, high);

function gradient(tones) {
  const pick = channel => [tones[0][channel], ...tones.map(tone => tone[channel])];
  const I = [0, ...tones.map((_, i) => Math.round(1 + 254 * i / (tones.length - 1)))];
  return {R: pick(0), G: pick(1), B: pick(2), A: [0, ...tones.map(() => 255)], I};
}

// while a map is shown, its colours alone mean something: what it is of is outlined white, all else dark
function palette() {
  const most = Math.max(0, ...said.labels.map(label => label.value));
  const found = Array.from({length: most + 1}, (_, value) => said.labels.find(label => label.value === value));
  const of = map === null ? undefined : said.maps[map].label;  // null: of all labels alike
  const colour = label => map === null ? label.colour : of === null || of === label.name ? [255, 255, 255] : [70, 70, 70];
  const pick = channel => found.map(label => label ? colour(label)[channel] : 0);
  return {R: pick(0), G: pick(1), B: pick(2), A: found.map(label => label ? 255 : 0), labels: found.map(label => label?.name ?? '')};
}

function drawLabels() {
  if (hidden.size) labels.img.forEach((_, i) => { labels.img[i] = hidden.has(drawnLabels[i]) ? 0 : drawnLabels[i]; });
  else labels.img.set(drawnLabels);
  labels.opacity = Math.max(HIDDEN, Number(element('viewer-fill').value));
  nv.opts.atlasOutline = element('viewer-outline').checked ? 1 : 0;
  nv.updateGLVolume();
}

const load = async number => maps.has(number) || maps.set(number, await volume(`viewer-map-${number}`, 'map', 'inferno', 1, NaN, NaN));

async function setMap(number) {
  if (number !== map) await load(number);
  once(() => {
    if (map !== null) nv.removeVolume(maps.get(map));
    map = map === number ? null : number;
    if (map !== null) {
      nv.addVolume(maps.get(map));
      nv.setVolume(maps.get(map), 1);  // below the labels
    }
    drawMap();
  });
  tell();
}

function drawMap() {
  for (const button of all('[data-map]')) button.setAttribute('aria-pressed', Number(button.dataset.map) === map);
  element('viewer-legend')?.toggleAttribute('hidden', map === null);
  if (map !== null) colourMap(maps.get(map), said.maps[map]);
  labels.setColormapLabel(palette());
  nv.updateGLVolume();
}

function colourMap(drawn, facts) {
  const low = Number(element('viewer-least').value) * facts.full;
  Object.assign(drawn, {
    colormap: facts.signed ? 'pro' : 'inferno', colormapType: 1, cal_min: low, cal_max: facts.full,
    colormapNegative: facts.signed ? 'contra' : '', cal_minNeg: -low, cal_maxNeg: -facts.full,
    opacity: Number(element('viewer-strength').value), colorbarVisible: false,
  });
  element('viewer-bar').className = facts.signed ? 'bar signed' : 'bar';
  element('viewer-ends').replaceChildren(...(facts.signed ? [-facts.full, 0, facts.full] : [0, facts.full]).map(end => span(figures(end))));
  element('viewer-unit').textContent = `${facts.unit}; clear below ${figures(low)}`;
  element('viewer-says').replaceChildren(...facts.says.map(span));
  element('viewer-says').className = facts.doubtful ? 'says alarm' : 'says quiet';
}

const span = words => Object.assign(document.createElement('span'), {textContent: words});
const figures = value => String(Number(value.toPrecision(3)));

function setView(button) {
  for (const other of element('viewer-views').children) other.setAttribute('aria-pressed', other === button);
  const view = Number(button.dataset.view);
  nv.customLayout = view === niivue.SLICE_TYPE.MULTIPLANAR ? planes() : null;
  nv.setSliceType(view);
  const opacity = view === niivue.SLICE_TYPE.RENDER ? 0 : 1;  // in 3-D air and skin would hide what was found
  if (scan.opacity !== opacity) nv.setOpacity(0, opacity);
}

function planes() {
  const {AXIAL, CORONAL, SAGITTAL} = niivue.SLICE_TYPE, wide = canvas.clientWidth > canvas.clientHeight;
  const place = (sliceType, left, top, width, height) => ({
    sliceType, position: wide ? [left, top, width, height] : [top, left, height, width],
  });
  return [place(AXIAL, 0, 0, 0.625, 1), place(CORONAL, 0.625, 0, 0.375, 0.5), place(SAGITTAL, 0.625, 0.5, 0.375, 0.5)];
}

function setWindow() {
  const level = Number(element('viewer-level').value), width = Number(element('viewer-width').value);
  scan.cal_min = level - width / 2;
  scan.cal_max = level + width / 2;
  nv.updateGLVolume();
  showWindow();
}

function resetWindow() {
  [scan.cal_min, scan.cal_max] = said.window;
  nv.updateGLVolume();
  showWindow();
}

function showWindow() {
  const level = (scan.cal_min + scan.cal_max) / 2, width = scan.cal_max - scan.cal_min;
  element('viewer-level').value = level;
  element('viewer-width').value = width;
  element('viewer-window').textContent = `level ${figures(level)}, width ${figures(width)}`;
}

function go(mm) {
  nv.scene.crosshairPos = nv.mm2frac(mm);
  nv.drawScene();
  nv.createOnLocationChange();
}

let last = null;
function tell(here) {
  last = here ?? last;
  if (!last) return;
  const sides = SIDES.map(([up, down], axis) => `${last.mm[axis] < 0 ? down : up} ${Math.abs(last.mm[axis]).toFixed(1)}`);
  const words = [`${sides.join(', ')} mm`];
  for (const shown of nv.volumes) {
    const value = shown.getValue(...shown.mm2vox([...last.mm].slice(0, 3)));
    if (shown === scan) words.push(`${said.channel} ${Number(value.toPrecision(5))}`);
    else if (shown === labels) words.push(said.labels.find(label => label.value === Math.round(value))?.name ?? 'no label');
    else words.push(`${said.maps[map].word} ${figures(value)}`);
  }
  element('viewer-place').textContent = words.join(' · ');
}

function wire() {
  const sounds = (id, act) => element(id).addEventListener('input', act);
  sounds('viewer-level', setWindow);
  sounds('viewer-width', setWindow);
  element('viewer-reset').addEventListener('click', resetWindow);
  sounds('viewer-outline', drawLabels);
  sounds('viewer-fill', drawLabels);
  sounds('viewer-crosshair', () => nv.setCrosshairWidth(element('viewer-crosshair').checked ? thin() : 0));
  if (said.maps.length) {
    sounds('viewer-least', drawMap);
    sounds('viewer-strength', drawMap);
  }
  for (const button of element('viewer-views').children) button.addEventListener('click', () => setView(button));
  for (const box of all('[data-label]')) box.addEventListener('input', () => {
    hidden[box.checked ? 'delete' : 'add'](Number(box.dataset.label));
    drawLabels();
  });
  document.addEventListener('click', event => {
    const button = event.target.closest('[data-map]'), place = event.target.closest('[data-mm]');
    if (button) setMap(Number(button.dataset.map));
    else if (place) jump(place);
  });
  new ResizeObserver(() => nv.customLayout && nv.setCustomLayout(planes())).observe(canvas);
  document.addEventListener('keydown', press);
  // NiiVue's own keys and its double click, which forgets the window, stay out
  for (const kind of ['keydown', 'keyup']) canvas.addEventListener(kind, move, true);
  canvas.addEventListener('dblclick', event => { event.stopImmediatePropagation(); resetWindow(); }, true);
  canvas.addEventListener('webglcontextlost', () => giveUp(Error('The viewer lost the graphics card.')));
  showWindow();
}

function jump(place) {
  for (const row of all('[data-mm][aria-current]')) row.removeAttribute('aria-current');
  place.setAttribute('aria-current', 'true');
  go(place.dataset.mm.split(' ').map(Number));
  const box = canvas.getBoundingClientRect();
  if (box.top < 0 || box.bottom > innerHeight) canvas.scrollIntoView({block: 'start'});
}

function move(event) {
  event.stopImmediatePropagation();
  if (event.type !== 'keydown' || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS) {
    event.preventDefault();
    nv.moveCrosshairInVox(...KEYS[event.key]);
  } else press(event);
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest('input[type=text]')) return;
  const view = element('viewer-views').querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  const toggle = document.querySelector(`input[data-key="${CSS.escape(event.key)}"]`);
  if (view) setView(view);
  else if (toggle) toggle.click();
  else if (event.key === 'm') nextMap();
  else if (event.key === 'n' || event.key === 'p') nextFinding(event.key === 'n' ? 1 : -1);
}

function nextMap() {
  const able = all('.layers [data-map]:not([disabled])').map(button => Number(button.dataset.map));
  const next = able[map === null ? 0 : able.indexOf(map) + 1];
  if (able.length) setMap(next ?? map);  // after the last: none
}

function nextFinding(by) {
  const rows = all('tr[data-mm]'), at = rows.findIndex(row => row.hasAttribute('aria-current'));
  if (rows.length) jump(rows[(at + by + rows.length + (at < 0 && by < 0 ? 1 : 0)) % rows.length]);
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


'use strict';
(() => {
const $ = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColours = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c6d1f', '#7b7f86'];
const lineColours = [...runColours, '#882255', '#44aa99', '#aa4499', '#6699cc', '#117733'];
const kindColours = {
  RESTART: '#0072b2', SKIP: '#c2410c', NON_FINITE: '#c2410c', HASH_MISMATCH: '#c2410c', CHECKPOINT_FAILED: '#c2410c',
  RECORDS_LOST: '#c2410c', OTHER: '#c2410c', INCIDENT: '#e69f00', SPIKE: '#e69f00', STRAGGLER: '#cc79a7', SIGNAL: '#8c6d1f', CHECKPOINT_SAVED: '#009e73',
};
const troubles = ['SKIP', 'NON_FINITE', 'HASH_MISMATCH', 'CHECKPOINT_FAILED', 'RECORDS_LOST', 'SPIKE', 'OTHER'];

// --- The numbers -----------------------------------------------------------------------------------------------

function bytesOf(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; ++i) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
}
// The inverse of packed() in tools/log_report.cc.
function unpack(packed) {
  const codes = new Uint16Array(bytesOf(packed.data)), values = new Float32Array(codes.length);
  const scale = (packed.highest - packed.lowest) / 64999;
  for (let i = 0; i < codes.length; ++i) {
    const q = codes[i];
    values[i] = q === 0 ? 0 : q === 65535 ? NaN : q === 65534 ? Infinity : Math.exp(packed.lowest + (q - 1) * scale);
  }
  return values;
}
function load(raw) {
  const run = {name: raw.name, facts: raw.facts, events: raw.events, allEvents: raw.all_events, scalars: {}, dense: {},
               steps: new Float64Array(bytesOf(raw.steps)), columnSteps: raw.column_steps, coarseSteps: raw.coarse_steps,
               incidents: raw.incidents || []};
  for (const [name, scalar] of Object.entries(raw.scalars)) {
    run.scalars[name] = new Float32Array(bytesOf(scalar.data));
    run.scalars[name].stride = scalar.stride;  // steps that each is the mean of
  }
  for (const [name, dense] of Object.entries(raw.dense || {})) {
    run.dense[name] = {rows: dense.rows.map(([label, layer, kind]) => ({label, layer, kind})), columns: dense.columns,
                       second: dense.second || null, values: unpack(dense.values)};
  }
  return run;
}
const runs = JSON.parse($('data').textContent).runs.map(load);
let run = runs[0];

const digits = (value, n = 4) => value === Infinity ? 'not finite' : Number.isNaN(value) ? '' :
    Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(n - 2) :
    String(Number(value.toPrecision(n)));
const whole = (value) => Math.round(value).toLocaleString('en');
const duration = (s) => s < 90 ? `${digits(s, 3)} s` : s < 5400 ? `${digits(s / 60, 3)} min` : `${digits(s / 3600, 3)} h`;
const finite = (values) => Array.from(values).filter(Number.isFinite);
const median = (values) => {
  const sorted = finite(values).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : NaN;
};
const lastOf = (values) => finite(values.slice(-50)).pop();
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// --- Heading ---------------------------------------------------------------------------------------------------

function sentence(r) {
  const last = r.steps[r.steps.length - 1] || 0, loss = r.scalars.cross_entropy || r.scalars.loss;
  let text = `${r.name}: ${whole(last)} of ${whole(r.facts.planned_steps)} steps`;
  if (loss) text += `, loss ${digits(loss[0])} at the start and ${digits(lastOf(loss))} at the end`;
  const bad = r.events.filter((e) => troubles.includes(e.kind) && !e.superseded);
  const found = r.incidents.length;
  text += r.facts.finished ? '. ' : '; the log has no end: it is still being written, or the run was cut off. ';
  if (!bad.length && !found && !r.facts.skipped) return text + 'No update was left out and nothing spiked.';
  const counts = {};
  for (const e of bad) counts[e.kind] = (counts[e.kind] || 0) + 1;
  const parts = Object.entries(counts).map(([kind, n]) => `${n} × ${kind.toLowerCase().replaceAll('_', ' ')}`);
  if (found) parts.push(`${found} incident${found > 1 ? 's' : ''} found in the curves`);
  return text + `To look at: ${parts.join(', ') || `${r.facts.skipped} updates left out`}.`;
}
function showHeading() {
  $('title').textContent = runs.length > 1 ? `${runs.length} runs: ${runs.map((r) => r.name).join(', ')}` : run.name;
  document.title = $('title').textContent + ' – run report';
  $('lead').textContent = sentence(run);
  $('why').replaceChildren(...run.incidents.filter((i) => i.sentence).map((i) => element('li', {}, element(
      'button', {textContent: i.sentence, title: 'show this layer and step', onclick: () => pickStep(i.layer, i.step)}))));
  const f = run.facts, l = f.layout;
  const facts = {
    'layout': `${l.world} rank${l.world > 1 ? 's' : ''}: tensor ${l.tensor} × data ${l.data}, expert ${l.expert}` +
        (l.expert_tensor > 1 ? ` × ${l.expert_tensor}` : '') + `, ${l.threads} thread${l.threads > 1 ? 's' : ''} each`,
    'tokens': whole(f.tokens), 'training time': duration(f.seconds),
    'rate, median': run.scalars.tokens_per_second ? `${whole(median(run.scalars.tokens_per_second))} tokens/s` : '',
    'share of the machine': run.scalars.share_of_limit ? `${digits(100 * median(run.scalars.share_of_limit), 3)} %` : '',
    'started': f.started ? new Date(1000 * f.started).toISOString().replace('T', ' ').slice(0, 16) + ' UTC' : '',
    'starts': f.attempts.length, 'clipped steps': whole(f.clipped), 'updates left out': whole(f.skipped),
    'version': f.code_version, 'host': [...new Set(f.hosts)].join(', '),
  };
  $('facts').replaceChildren(...Object.entries(facts).filter(([, v]) => v !== '').map(
      ([name, value]) => element('div', {}, element('dt', {textContent: name}), element('dd', {textContent: value}))));
}

// --- Charts over steps -----------------------------------------------------------------------------------------

const linked = new Set();  // charts that zoom together
let linking = false;
function show(chart, range) {
  chart.updateOptions({dateWindow: range, ...(chart.shownRows ? {file: thinned(chart.shownRows, range)} : {})});
}
function follow(chart) {
  if (linking) return;
  linking = true;
  const range = chart.isZoomed('x') ? chart.xAxisRange() : null;
  for (const each of linked) show(each, range);
  linking = false;
}
const marksOf = (r) => {
  const marks = r.events.filter((e) => kindColours[e.kind] && !e.superseded).map((e) => ({step: e.step, kind: e.kind}));
  for (const incident of r.incidents) marks.push({step: incident.step, kind: 'INCIDENT'});
  for (const a of r.facts.attempts) {
    if (a.attempt > 0 && !marks.some((m) => m.kind === 'RESTART' && m.step >= a.resume_step - 1 && m.step <= a.resume_step))
      marks.push({step: a.resume_step, kind: 'RESTART'});
  }
  return marks;
};
let marks = marksOf(run);
function drawMarks(context, area, chart) {
  let drawn = 0;
  for (const mark of marks) {
    const x = chart.toDomXCoord(mark.step);
    if (x < area.x || x > area.x + area.w) continue;
    context.fillStyle = kindColours[mark.kind];
    if (mark.kind === 'CHECKPOINT_SAVED') {
      context.fillRect(x - 1, area.y + area.h - 8, 2, 8);
    } else {
      context.globalAlpha = 0.75;
      context.fillRect(x - 0.75, area.y, 1.5, area.h);
      context.globalAlpha = 1;
    }
    ++drawn;
  }
  if (picked.step > 0) {
    const x = chart.toDomXCoord(picked.step);
    context.fillStyle = style('--soft');
    for (let y = area.y; y < area.y + area.h; y += 6) context.fillRect(x, y, 1, 3);
  }
  chart.marksDrawn = drawn;
}
function showMarks() {
  const kinds = [...new Set(marks.map((m) => m.kind))];
  $('marks').replaceChildren(...kinds.map((kind) => {
    const swatch = element('i');
    swatch.style.background = kindColours[kind];
    return element('li', {}, swatch, `${kind.toLowerCase().replaceAll('_', ' ')} (${marks.filter((m) => m.kind === kind).length})`);
  }));
}
// Names and values of a chart's lines stand in a line of their own above it.
function labelsAbove(div) {
  if (!div.previousElementSibling.classList.contains('labels')) div.before(element('div', {className: 'labels'}));
  return div.previousElementSibling;
}
function chartOver(div, rows, labels, options) {
  const chart = new Dygraph(div, rows, {
    labels, legend: 'always', labelsDiv: labelsAbove(div), animatedZooms: false, axisLineColor: style('--line'), gridLineColor: style('--line'),
    strokeWidth: 1.3, colors: lineColours, connectSeparatedPoints: false, labelsKMB: true, digitsAfterDecimal: 4,
    underlayCallback: drawMarks, rightGap: 8,
    axes: {y: {axisLabelWidth: 60, valueFormatter: (v) => digits(v), axisLabelFormatter: (v) => digits(v, 3)},
           x: {axisLabelFormatter: (v) => whole(v), valueFormatter: (v) => `step ${whole(v)}`}},
    zoomCallback: () => follow(chart), ...options,
  });
  linked.add(chart);
  return chart;
}
// A row per step that any run has; null where a run has none.
function overlay(name) {
  const fallback = name === 'loss' ? 'cross_entropy' : name, columns = runs.map((r) => r.scalars[name] || r.scalars[fallback]);
  if (runs.length === 1) {
    return Array.from(run.steps, (step, i) => [step, columns[0] && Number.isFinite(columns[0][i]) ? columns[0][i] : NaN]);
  }
  const rows = new Map();
  runs.forEach((r, k) => {
    for (let i = 0; columns[k] && i < r.steps.length; ++i) {
      if (!rows.has(r.steps[i])) rows.set(r.steps[i], [r.steps[i], ...runs.map(() => null)]);
      const value = columns[k][i];
      rows.get(r.steps[i])[k + 1] = Number.isFinite(value) ? value : NaN;
    }
  });
  return [...rows.values()].sort((a, b) => a[0] - b[0]);
}
// Means over the `roll` rows up to each, of what is there.
function averaged(rows, roll) {
  if (roll <= 1) return rows;
  const width = rows.length ? rows[0].length : 0, sums = new Array(width).fill(0), counts = new Array(width).fill(0);
  return rows.map((row, i) => {
    for (let k = 1; k < width; ++k) {
      const gone = i >= roll ? rows[i - roll][k] : NaN;
      if (Number.isFinite(row[k]) && row[k] !== null) sums[k] += row[k], ++counts[k];
      if (Number.isFinite(gone) && gone !== null) sums[k] -= gone, --counts[k];
    }
    return [row[0], ...row.slice(1).map((v, k) => v === null ? null : counts[k + 1] ? sums[k + 1] / counts[k + 1] : NaN)];
  });
}
// The rows of a range, at most some thousands: of more, those with a line's least or greatest value of its neighbours,
// which draw the same picture.
function thinned(rows, range) {
  const below = (x) => {
    let low = 0, high = rows.length;
    while (low < high) rows[(low + high) >> 1][0] < x ? (low = ((low + high) >> 1) + 1) : (high = (low + high) >> 1);
    return low;
  };
  const from = range ? Math.max(0, below(range[0]) - 1) : 0, to = range ? Math.min(rows.length, below(range[1]) + 2) : rows.length;
  const most = 1500, kept = [];
  if (to - from <= 2 * most) return rows.slice(from, to);
  const width = Math.ceil((to - from) / most);
  for (let begin = from; begin < to; begin += width) {
    const end = Math.min(begin + width, to), chosen = new Set([begin]);
    for (let k = 1; k < rows[begin].length; ++k) {
      let least = -1, greatest = -1;
      for (let i = begin; i < end; ++i) {
        const v = rows[i][k];
        if (v === null) continue;
        if (Number.isNaN(v)) chosen.add(i);
        if (least < 0 || v < rows[least][k]) least = i;
        if (greatest < 0 || v > rows[greatest][k]) greatest = i;
      }
      if (least >= 0) chosen.add(least).add(greatest);
    }
    kept.push(...[...chosen].sort((a, b) => a - b).map((i) => rows[i]));
  }
  if (kept[kept.length - 1] !== rows[to - 1]) kept.push(rows[to - 1]);
  return kept;
}
const names = runs.map((r, k) => runs.some((o, j) => j !== k && o.name === r.name) ? `${r.name} (${k + 1})` : r.name);
const charts = {};
function showCourse() {
  const make = (div, name, options) => {
    const every = overlay(name), chart = chartOver(div, thinned(every), ['step', ...names], {colors: runColours, ...options});
    chart.everyRow = chart.shownRows = every;
    return chart;
  };
  charts.loss = make($('loss'), 'loss', {});
  charts.norm = make($('norm'), 'grad_norm', {logscale: true});
  $('average').addEventListener('change', (event) => {
    const roll = Math.max(1, Number(event.target.value) || 1);
    for (const chart of [charts.loss, charts.norm]) {
      chart.shownRows = averaged(chart.everyRow, roll);
      show(chart, charts.loss.isZoomed('x') ? charts.loss.xAxisRange() : null);
    }
  });
  $('log-norm').addEventListener('change', (event) => charts.norm.updateOptions({logscale: event.target.checked}));
}

// --- Heat maps -------------------------------------------------------------------------------------------------

const warm = [[13, 8, 135], [84, 2, 163], [139, 10, 165], [185, 50, 137], [219, 92, 104], [244, 136, 73], [254, 188, 43], [240, 249, 33]];
const balance = [[5, 48, 97], [67, 147, 195], [209, 229, 240], [247, 247, 247], [253, 219, 199], [214, 96, 77], [103, 0, 31]];
function colourAt(stops, t) {
  const at = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at)), u = at - i;
  return stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * u));
}
// Rows of equal height, the first at the bottom. Returns where the plot lies.
function paint(canvas, rows, columns, labels, value, stops, place) {
  const ratio = window.devicePixelRatio || 1, width = canvas.parentElement.clientWidth, left = 84;
  const row = Math.max(3, Math.min(18, Math.floor(420 / rows))), height = rows * row + 22;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  context.scale(ratio, ratio);
  const image = new ImageData(columns, rows);
  for (let r = 0; r < rows; ++r) {
    for (let c = 0; c < columns; ++c) {
      const v = value(r, c), at = 4 * ((rows - 1 - r) * columns + c);
      const [red, green, blue, alpha] = v === Infinity ? [0, 200, 83, 255] : Number.isNaN(v) ? [128, 128, 128, 60] :
          [...colourAt(stops, place(v)), 255];
      image.data.set([red, green, blue, alpha], at);
    }
  }
  const buffer = document.createElement('canvas');
  buffer.width = columns;
  buffer.height = rows;
  buffer.getContext('2d').putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(buffer, left, 0, width - left, rows * row);
  context.fillStyle = style('--soft');
  context.font = '11px system-ui, sans-serif';
  context.textAlign = 'right';
  const every = Math.ceil(13 / row);
  for (let r = 0; r < rows; r += every) context.fillText(labels[r], left - 6, (rows - r) * row - row / 2 + 4);
  return {left, width: width - left, row, rows, columns, height: rows * row, context};
}
function stepLabels(map, steps) {
  map.context.textAlign = 'center';
  for (let i = 0; i <= 6; ++i) {
    const c = Math.min(map.columns - 1, Math.round(i / 6 * map.columns));
    const x = map.left + (c + 0.5) / map.columns * map.width;
    map.context.fillText(whole(steps[c]), Math.min(x, map.left + map.width - 16), map.height + 15);
  }
}
function cellAt(map, event) {
  const box = event.currentTarget.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - map.left) / map.width * map.columns);
  const row = map.rows - 1 - Math.floor((event.clientY - box.top) / map.row);
  return column < 0 || column >= map.columns || row < 0 || row >= map.rows ? null : {row, column};
}
function frame(map, row, column) {
  const context = map.context, y = (map.rows - 1 - row) * map.row, x = map.left + (column + 0.5) / map.columns * map.width;
  context.strokeStyle = '#00e5ff';
  context.lineWidth = 1.5;
  context.strokeRect(map.left, y, map.width, map.row);
  context.beginPath();
  context.moveTo(x, 0);
  context.lineTo(x, map.height);
  context.stroke();
}
function showScale(div, stops, from, to, note) {
  const canvas = element('canvas', {width: 200, height: 1});
  for (let i = 0; i < 200; ++i) {
    canvas.getContext('2d').fillStyle = `rgb(${colourAt(stops, i / 199).join(',')})`;
    canvas.getContext('2d').fillRect(i, 0, 1, 1);
  }
  const [least, most, what] = [from, to, note].map((text) => element('span', {textContent: text}));
  div.replaceChildren(least, canvas, most, what);
}

// --- Layers ----------------------------------------------------------------------------------------------------

const picked = {layer: -1, column: -1, step: 0, routerLayer: 0};
const summed = ['layer_grad_norm', 'param_norm', 'update_norm'];  // norms of a layer's kinds add in squares
const titles = {layer_grad_norm: 'gradient norm', update_norm: 'update norm', param_norm: 'weight norm',
                adam_rms: 'Adam RMS', grad_absmax: 'largest gradient element', resid_rms: 'residual stream RMS',
                resid_absmax: 'largest residual element', dresid_norm: 'gradient norm at the block’s output',
                attn_logit_max: 'largest attention logit', nonfinite: 'gradient elements that are not finite',
                router_entropy: 'router entropy', router_logit_max: 'largest router logit', dropped: 'dropped choices'};
let heat = null;
// Rows of the heat map: blocks from the bottom, then what belongs to none.
function layerRows(dense) {
  const rows = new Map();
  dense.rows.forEach((entry, i) => {
    const key = entry.layer >= 0 ? `layer ${entry.layer}` : entry.kind || entry.label;
    if (!rows.has(key)) rows.set(key, {label: key, layer: entry.layer, elements: []});
    rows.get(key).elements.push(i);
  });
  return [...rows.values()].sort((a, b) => (a.layer < 0) - (b.layer < 0) || a.layer - b.layer);
}
function combined(name, dense, row, column) {
  let value = NaN;
  for (const i of row.elements) {
    const v = dense.values[i * dense.columns + column];
    if (Number.isNaN(v)) continue;
    if (Number.isNaN(value)) value = 0;
    value = summed.includes(name) ? Math.hypot(value, v) : name === 'nonfinite' ? value + v : Math.max(value, v);
  }
  return value;
}
function logScale(values) {
  const logs = finite(values).filter((v) => v > 0).map(Math.log).sort((a, b) => a - b);
  const low = logs.length ? logs[Math.floor(0.005 * logs.length)] : 0;
  const high = logs.length ? Math.max(logs[logs.length - 1], low + 1e-6) : 1;
  return {low: Math.exp(low), high: Math.exp(high), place: (v) => v > 0 ? (Math.log(v) - low) / (high - low) : 0};
}
function showHeat() {
  const name = $('heat-metric').value, dense = run.dense[name];
  if (!dense || !dense.columns) return;
  const rows = layerRows(dense), values = new Float32Array(rows.length * dense.columns);
  rows.forEach((row, r) => {
    for (let c = 0; c < dense.columns; ++c) values[r * dense.columns + c] = combined(name, dense, row, c);
  });
  const {low, high, place} = logScale(values);
  const map = paint($('heat'), rows.length, dense.columns, rows.map((r) => r.label), (r, c) => values[r * dense.columns + c],
                    warm, place);
  stepLabels(map, run.columnSteps);
  heat = {map, rows, dense, name, values};
  const r = rows.findIndex((each) => each.layer === picked.layer);
  if (r >= 0 && picked.column >= 0) frame(map, r, Math.min(picked.column, dense.columns - 1));
  const per = run.columnSteps.length > 1 ? run.columnSteps[1] - run.columnSteps[0] : 1;
  showScale($('heat-scale'), warm, digits(low, 3), digits(high, 3),
            (per > 1 ? `largest of ${per} steps a column; ` : '') + 'logarithmic scale; green: not finite');
}
function readHeat(event) {
  const cell = heat && cellAt(heat.map, event);
  if (!cell) return ($('heat-read').textContent = '');
  const v = heat.values[cell.row * heat.dense.columns + cell.column];
  $('heat-read').textContent = `${heat.rows[cell.row].label}, step ${whole(run.columnSteps[cell.column])}: ${digits(v)}`;
}
function pick(layer, column) {
  picked.layer = layer;
  picked.column = column;
  picked.step = run.columnSteps[column] || 0;
  const entries = routerRows();
  const at = entries.findIndex((entry) => entry.layer === layer);
  if (at >= 0) {
    picked.routerLayer = at;
    $('router-layer').value = at;
  }
  showHeat();
  showLayer();
  showGain();
  showRouter();
  for (const chart of [charts.loss, charts.norm, charts.times]) if (chart) chart.updateOptions({});
}
function pickStep(layer, step) {
  let column = 0;
  while (column + 2 < run.columnSteps.length && run.columnSteps[column + 1] <= step) ++column;
  pick(layer >= 0 ? layer : picked.layer, column);
  $('layers').scrollIntoView({behavior: 'smooth'});
}
// The picked layer's kinds of tensors over the steps.
function showLayer() {
  const dense = run.dense.layer_grad_norm;
  if (charts.layer) {
    linked.delete(charts.layer);
    charts.layer.destroy();
    charts.layer = null;
  }
  if (!dense || !dense.columns) return;
  const elements = dense.rows.map((entry, i) => ({...entry, i})).filter((entry) => entry.layer === picked.layer);
  const label = picked.layer >= 0 ? `Layer ${picked.layer}` : 'Outside of the layers';
  $('layer-title').textContent = `${label}: gradient norm by kind of tensor`;
  const rows = [];
  for (let c = 0; c < dense.columns; ++c) {
    rows.push([run.columnSteps[c], ...elements.map((e) => {
      const v = dense.values[e.i * dense.columns + c];
      return v > 0 && Number.isFinite(v) ? v : null;
    })]);
  }
  charts.layer = chartOver($('layer'), rows, ['step', ...elements.map((e) => e.kind || e.label)],
                           {logscale: true, highlightSeriesOpts: {strokeWidth: 2.5}});
  if (charts.loss.isZoomed('x')) charts.layer.updateOptions({dateWindow: charts.loss.xAxisRange()});
}
// Of a block, both measured at the outputs of blocks: RMS of the residual stream over that of the block below; gradient
// that it hands to the block below over the one that it got. What block 0 hands down is not recorded; the embedding's
// gradient stands in for it.
function gains(column) {
  const at = (name) => {
    const dense = run.dense[name];
    return dense ? dense.rows.map((_, i) => dense.values[i * dense.columns + column]) : null;
  };
  const forward = at('resid_rms'), backward = at('dresid_norm'), norms = run.dense.layer_grad_norm;
  const embedding = norms ? norms.rows.findIndex((entry) => entry.kind === 'embedding') : -1;
  const below = (l) => l > 0 ? backward[l - 1] : embedding >= 0 ? norms.values[embedding * norms.columns + column] : NaN;
  if (!forward && !backward) return null;
  const layers = (forward || backward).length, rows = [];
  for (let l = 0; l < layers; ++l) {
    rows.push([l, forward && l > 0 ? forward[l] / forward[l - 1] : null,
               backward && !Number.isNaN(below(l)) ? below(l) / backward[l] : null]);
  }
  return rows;
}
function showGain() {
  if (charts.gain) charts.gain.destroy();
  charts.gain = null;
  const rows = gains(Math.max(0, picked.column));
  $('gain').hidden = !rows;
  labelsAbove($('gain')).hidden = !rows;
  $('gain-missing').hidden = !!rows;
  $('gain-hint').hidden = !rows;
  $('gain-missing').textContent = 'This log does not record the residual stream’s size (resid_rms, dresid_norm).';
  if (!rows) return;
  $('gain-title').textContent = `Gain from layer to layer around step ${whole(picked.step)}`;
  charts.gain = new Dygraph($('gain'), rows, {
    labels: ['layer', 'forward', 'backward'], legend: 'always', labelsDiv: labelsAbove($('gain')), drawPoints: true, pointSize: 3, colors: runColours,
    logscale: true,  // ratios; and the embedding's stand-in may be far from the rest
    axisLineColor: style('--line'), gridLineColor: style('--line'), xRangePad: 10,
    axes: {y: {axisLabelWidth: 60, axisLabelFormatter: (v) => digits(v, 3)},
           x: {axisLabelFormatter: (v) => Number.isInteger(v) ? v : '', valueFormatter: (v) => `layer ${v}`}},
  });
}
function showLayers() {
  const dense = run.dense.layer_grad_norm;
  $('layers').hidden = !dense || !dense.columns;
  if ($('layers').hidden) return;
  const choices = Object.keys(run.dense).filter((name) => !run.dense[name].second && run.dense[name].rows.some((r) => r.layer >= 0));
  choices.sort((a, b) => (b === 'layer_grad_norm') - (a === 'layer_grad_norm'));
  $('heat-metric').replaceChildren(...choices.map((name) => element('option', {value: name, textContent: titles[name] || name})));
  const first = layerRows(dense);
  pick(first[0].layer, dense.columns - 1);
}

// --- Router ----------------------------------------------------------------------------------------------------

const routerRows = () => run.dense.expert_load ? run.dense.expert_load.rows : [];
// Of one layer and coarse column: loads as multiples of a balanced one, and what follows from them.
function loads(layer, column) {
  const dense = run.dense.expert_load, experts = dense.second.length, counts = [];
  for (let e = 0; e < experts; ++e) counts.push(dense.values[(layer * experts + e) * dense.columns + column]);
  const sum = counts.reduce((a, b) => a + b, 0);
  const shares = counts.map((v) => v / sum);
  const entropy = -shares.reduce((a, p) => a + (p > 0 ? p * Math.log(p) : 0), 0) / Math.log(experts);
  return {relative: shares.map((p) => p * experts), entropy, excess: Math.max(...shares) * experts - 1,
          dead: counts.filter((v) => v === 0).length};
}
// What the heat map of the experts shows of a layer.
function expertView(layer, columns) {
  const norms = run.dense.expert_grad_norm;
  if (!norms || $('router-metric').value === 'load') {
    // 1/8 and less to 8 times and more, logarithmic, white is balanced.
    return {value: (e, c) => columns[c].relative[e], stops: balance, place: (v) => v > 0 ? (Math.log2(v) + 3) / 6 : 0,
            scale: ['1/8', '8', 'times a balanced load']};
  }
  // Measured every so many steps: a column without one shows what was measured last.
  const experts = norms.second.length, values = new Float32Array(experts * norms.columns);
  for (let i = 0; i < values.length; ++i) {
    const v = norms.values[layer * values.length + i];
    values[i] = Number.isNaN(v) && i % norms.columns ? values[i - 1] : v;
  }
  const {low, high, place} = logScale(values);
  return {value: (e, c) => values[e * norms.columns + c], stops: warm, place,
          scale: [digits(low, 3), digits(high, 3), 'gradient norm of an expert’s matrices, logarithmic scale']};
}
let loadMap = null;
function coarseColumn() {
  let column = 0;
  while (column + 2 < run.coarseSteps.length && run.coarseSteps[column + 1] <= picked.step) ++column;
  return column;
}
function showRouter() {
  const dense = run.dense.expert_load;
  $('router').hidden = !dense || !dense.columns;
  if ($('router').hidden) return;
  const layer = picked.routerLayer, experts = dense.second.length, columns = [];
  for (let c = 0; c < dense.columns; ++c) columns.push(loads(layer, c));
  $('router-metric').parentElement.hidden = !run.dense.expert_grad_norm;
  const view = expertView(layer, columns);
  loadMap = paint($('load'), experts, dense.columns, dense.second.map((e) => `expert ${e}`), view.value, view.stops, view.place);
  loadMap.value = view.value;
  stepLabels(loadMap, run.coarseSteps);
  showScale($('load-scale'), view.stops, ...view.scale);
  const entropy = columns.map((c, i) => [run.coarseSteps[i], c.entropy, c.excess]);
  if (charts.router) {
    linked.delete(charts.router);
    charts.router.destroy();
  }
  charts.router = chartOver($('router-chart'), entropy, ['step', 'entropy of the load', 'MaxVio'],
                            {includeZero: true, colors: runColours});
  const at = coarseColumn(), number = {className: 'number'};
  const head = element('tr', {}, ...['layer', 'entropy of the load', 'MaxVio', 'experts without a token'].map(
      (text, i) => element('th', {textContent: text, className: i ? 'number' : ''})));
  $('router-table').replaceChildren(
      element('caption', {className: 'hint', textContent: `around step ${whole(run.coarseSteps[at])}`}), head,
      ...dense.rows.map((entry, l) => {
        const of = loads(l, at);
        return element('tr', {className: of.dead || of.entropy < 0.8 ? 'bad' : ''}, element('td', {textContent: entry.label}),
                       element('td', {...number, textContent: digits(of.entropy, 3)}),
                       element('td', {...number, textContent: digits(of.excess, 3)}),
                       element('td', {...number, textContent: `${of.dead} of ${experts}`}));
      }));
}
function readLoad(event) {
  const cell = loadMap && cellAt(loadMap, event);
  $('router-read').textContent = !cell ? '' :
      `expert ${cell.row}, step ${whole(run.coarseSteps[cell.column])}: ${digits(loadMap.value(cell.row, cell.column), 3)}`;
}

// --- Time, events, configuration -------------------------------------------------------------------------------

function showTimes() {
  if (charts.times) {
    linked.delete(charts.times);
    charts.times.destroy();
    charts.times = null;
  }
  const parts = ['forward', 'backward', 'communication', 'optimizer', 'data'].filter((p) => run.scalars[`${p}_seconds`]);
  const total = run.scalars.step_seconds, n = total ? total.length : 0;
  $('time').hidden = !total || !parts.length || !n;
  if ($('time').hidden) return;
  const width = Math.ceil(n / 1000), rows = [];
  for (let i = 0; i < n; i += width) {
    const mean = (values) => {
      const some = finite(values.subarray(i, i + width));
      return some.reduce((a, b) => a + b, 0) / Math.max(1, some.length);
    };
    const means = parts.map((p) => mean(run.scalars[`${p}_seconds`]));
    rows.push([run.steps[i * total.stride], ...means, Math.max(0, mean(total) - means.reduce((a, b) => a + b, 0))]);
  }
  charts.times = chartOver($('times'), rows, ['step', ...parts, 'rest'],
                           {stackedGraph: true, ylabel: 'seconds', strokeWidth: 0.7, includeZero: true});
}
function showEvents() {
  const head = element('tr', {}, ...['step', 'kind', 'what', 'time, UTC'].map((text) => element('th', {textContent: text})));
  const time = (s) => s ? new Date(1000 * s).toISOString().replace('T', ' ').slice(0, 19) : '';
  const missing = run.allEvents - run.events.length;
  $('events-left-out').hidden = missing === 0;
  $('events-left-out').textContent = `Of ${whole(run.allEvents)} events this page holds ${whole(run.events.length)}: those that ` +
      `report trouble, and the newest. ${whole(missing)} are left out.`;
  $('events').replaceChildren(head, ...run.events.map((e) => element(
      'tr', {className: troubles.includes(e.kind) ? 'bad' : ''}, element('td', {className: 'number', textContent: whole(e.step)}),
      element('td', {textContent: e.kind.toLowerCase().replaceAll('_', ' ') + (e.superseded ? ' (computed again)' : '')}),
      element('td', {textContent: e.message}), element('td', {textContent: time(e.time)}))));
}
// "model.layers" → "4" from protobuf's text format.
function fields(text) {
  const found = new Map(), path = [];
  for (const line of text.split('\n')) {
    const opens = line.match(/^\s*(\w+) \{$/), is = line.match(/^\s*(\w+): (.*)$/);
    if (opens) path.push(opens[1]);
    else if (/^\s*\}$/.test(line)) path.pop();
    else if (is) {
      const name = [...path, is[1]].join('.');
      found.set(name, found.has(name) ? `${found.get(name)}, ${is[2]}` : is[2]);
    }
  }
  return found;
}
function showConfiguration() {
  $('config').textContent = run.facts.config;
  $('differences').replaceChildren();
  if (runs.length < 2) return;
  const all = runs.map((r) => fields(r.facts.config)), keys = [...new Set(all.flatMap((f) => [...f.keys()]))];
  const differing = keys.filter((key) => new Set(all.map((f) => f.get(key))).size > 1);
  const head = element('tr', {}, ...['field', ...names].map((text) => element('th', {textContent: text})));
  $('differences').replaceChildren(element('table', {id: 'difference-table'}, head, ...differing.map((key) => element(
      'tr', {}, element('td', {textContent: key}), ...all.map((f) => element('td', {textContent: f.get(key) ?? '(not set)'}))))));
}

function showRun() {
  marks = marksOf(run);
  showHeading();
  showMarks();
  const entries = routerRows();
  $('router-layer').replaceChildren(...entries.map((entry, i) => element('option', {value: i, textContent: entry.label})));
  picked.routerLayer = 0;
  showLayers();
  showRouter();
  showTimes();
  showEvents();
  showConfiguration();
}
if (runs.length > 1) {
  $('run-choice').hidden = false;
  $('run').replaceChildren(...names.map((name, i) => element('option', {value: i, textContent: name})));
  $('run').addEventListener('change', (event) => {
    run = runs[Number(event.target.value)];
    showRun();
  });
}
showCourse();
showRun();
$('heat-metric').addEventListener('change', showHeat);
$('heat').addEventListener('mousemove', readHeat);
$('heat').addEventListener('click', (event) => {
  const cell = heat && cellAt(heat.map, event);
  if (cell) pick(heat.rows[cell.row].layer, cell.column);
});
$('load').addEventListener('mousemove', readLoad);
$('router-metric').addEventListener('change', showRouter);
$('router-layer').addEventListener('change', (event) => {
  picked.routerLayer = Number(event.target.value);
  showRouter();
});
let resizing = 0;
window.addEventListener('resize', () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    showHeat();
    showRouter();
  }, 100);
});
// What a test looks at.
window.report = {runs, charts, picked, heat: () => heat, experts: () => loadMap, marks: () => marks, thinned, averaged};
})();

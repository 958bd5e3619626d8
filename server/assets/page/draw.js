// What is drawn: the block map and the curves. Colours come from the style sheet, so that they follow light and dark.

const HUES = [172, 24, 262, 48, 330, 205, 96, 0, 288, 140, 36, 228, 310, 72, 186, 350];

/** Gives every row of the batch a colour that stays its own while it runs, and that no other row has if there are enough. */
export class Palette {
  constructor() {
    this.slots = new Map();
  }

  /** The slots of these rows; those of rows that are gone become free. */
  assign(names) {
    const live = new Set(names);
    for (const name of this.slots.keys()) if (!live.has(name)) this.slots.delete(name);
    const taken = new Set(this.slots.values());
    let next = 0;
    for (const name of names) {
      if (this.slots.has(name)) continue;
      while (taken.has(next)) next += 1;
      taken.add(next);
      this.slots.set(name, next);
    }
    return names.map((name) => this.slots.get(name));
  }
}

/** The colour of a slot in the present scheme. */
export function colourOf(slot) {
  const style = getComputedStyle(document.documentElement);
  // Beyond the first sixteen the same hues come again, paler.
  const fade = Math.min(Math.floor(slot / HUES.length) * 9, 27);
  const light = parseFloat(style.getPropertyValue("--row-light")) + fade;
  return `hsl(${HUES[slot % HUES.length]} ${style.getPropertyValue("--row-strength")} ${light}%)`;
}

const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A canvas's context in CSS pixels, cleared, at the screen's own resolution. */
function surface(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

const FREE = 0;
const CACHED = 1;
const UNLISTED = 2;
const FIRST_ROW = 3;
const FLASH = 700;

/** The block map: a square per cell. Cells that became free flash, so that an abort can be seen. */
export class BlockMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.cells = [];
    this.freed = [];
    this.slots = [];
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.drawing = false;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** `runs` are pairs of a state and how many cells have it; `slots[i]` is the colour of row `i`. */
  show(runs, slots) {
    const cells = runs.flatMap(([state, count]) => new Array(count).fill(state));
    const now = performance.now();
    if (cells.length !== this.cells.length) this.freed = new Array(cells.length).fill(-FLASH);
    cells.forEach((state, i) => {
      if (state < UNLISTED && this.cells[i] >= UNLISTED) this.freed[i] = now;
    });
    [this.cells, this.slots] = [cells, slots];
    this.draw();
  }

  /** The largest squares of which all cells fit, stretched a little to fill the canvas. */
  grid(width, height) {
    const all = Math.max(1, this.cells.length);
    let size = Math.min(26, Math.ceil(Math.sqrt((width * height) / all)));
    while (size > 2 && Math.ceil(all / Math.floor(width / size)) * size > height) size -= 0.5;
    const across = Math.max(1, Math.floor(width / size));
    const down = Math.ceil(all / across);
    return { across, wide: width / across, high: Math.min(height / down, size * 1.3) };
  }

  /** Which cell is at this place of the canvas; its number may be too high. */
  cellAt(x, y) {
    const { width, height } = this.canvas.getBoundingClientRect();
    const { across, wide, high } = this.grid(width, height);
    return Math.floor(y / high) * across + Math.min(across - 1, Math.floor(x / wide));
  }

  draw() {
    const { pen, width, height } = surface(this.canvas);
    if (!width || !height) return;
    const { across, wide, high } = this.grid(width, height);
    const least = Math.min(wide, high);
    const gap = least > 8 ? 2 : least > 4 ? 1 : 0.5;
    const [w, h] = [wide - gap, high - gap];
    const round = Math.min(3, least / 5);
    const colours = { [FREE]: token("--free"), [CACHED]: token("--cached"), [UNLISTED]: token("--faint") };
    this.slots.forEach((slot, row) => (colours[FIRST_ROW + row] = colourOf(slot)));
    const [flash, hatch, now] = [token("--flash"), token("--hatch"), performance.now()];
    let moving = false;
    this.cells.forEach((state, i) => {
      const [x, y] = [(i % across) * wide, Math.floor(i / across) * high];
      pen.fillStyle = colours[state] ?? colours[UNLISTED];
      pen.beginPath();
      pen.roundRect(x, y, w, h, round);
      pen.fill();
      if (state === CACHED && least > 7) {
        pen.strokeStyle = hatch;
        pen.beginPath();
        pen.moveTo(x + w * 0.22, y + h * 0.78);
        pen.lineTo(x + w * 0.78, y + h * 0.22);
        pen.stroke();
      }
      const age = now - this.freed[i];
      if (state < UNLISTED && age < FLASH && !this.still.matches) {
        moving = true;
        pen.globalAlpha = 1 - age / FLASH;
        pen.fillStyle = flash;
        pen.beginPath();
        pen.roundRect(x, y, w, h, round);
        pen.fill();
        pen.globalAlpha = 1;
      }
    });
    if (moving && !this.drawing) {
      this.drawing = true;
      requestAnimationFrame(() => {
        this.drawing = false;
        this.draw();
      });
    }
  }
}

const SPAN = 60;

/** Lines over the last minute. A value that is `null` leaves a gap. */
export class Curve {
  constructor(canvas, names, unit) {
    this.canvas = canvas;
    this.names = names;
    this.unit = unit;
    this.points = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** `time` in seconds, one value per line. */
  push(time, ...values) {
    this.points.push([time, ...values]);
    while (this.points[0][0] < time - SPAN) this.points.shift();
    this.draw();
  }

  draw() {
    const { pen, width, height } = surface(this.canvas);
    if (!width) return;
    const now = this.points.at(-1)?.[0] ?? 0;
    const highest = Math.max(...this.points.flatMap(([, ...values]) => values), 0);
    const top = niceAbove(highest);
    const [foot, head] = [height - 1.5, 12];
    const x = (time) => width - ((now - time) / SPAN) * width;
    const y = (value) => foot - (value / top) * (foot - head);
    pen.strokeStyle = token("--line");
    pen.lineWidth = 1;
    for (const level of [0, 0.5, 1]) {
      pen.beginPath();
      pen.moveTo(0, Math.round(y(top * level)) + 0.5);
      pen.lineTo(width, Math.round(y(top * level)) + 0.5);
      pen.stroke();
    }
    if (highest > 0) {
      pen.fillStyle = token("--faint");
      pen.font = "10px system-ui, sans-serif";
      pen.fillText(`${top} ${this.unit}`, 0, 9);
    }
    this.names.forEach((_, line) => this.line(pen, line, x, y, foot));
  }

  line(pen, line, x, y, foot) {
    const colour = token(line === 0 ? "--curve" : "--curve-2");
    let run = [];
    const finish = () => {
      if (run.length > 1) {
        pen.strokeStyle = colour;
        pen.lineWidth = line === 0 ? 1.75 : 1.25;
        pen.lineJoin = "round";
        pen.beginPath();
        run.forEach(([px, py], i) => (i ? pen.lineTo(px, py) : pen.moveTo(px, py)));
        pen.stroke();
        if (line === 0) {
          pen.globalAlpha = 0.13;
          pen.fillStyle = colour;
          pen.lineTo(run.at(-1)[0], foot);
          pen.lineTo(run[0][0], foot);
          pen.fill();
          pen.globalAlpha = 1;
        }
      }
      run = [];
    };
    for (const [time, ...values] of this.points) {
      if (values[line] === null) finish();
      else run.push([x(time), y(values[line])]);
    }
    finish();
  }
}

/** The next of 1, 2, 5, 10, 20, ... */
function niceAbove(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return Number(([1, 2, 5, 10].find((step) => step * power >= value) * power).toPrecision(3));
}

// Maps as numbers and as colours: white at 0, red for the prompt, blue against it.

// Colours at even steps from -1 to 1.
const STOPS = [
  [33, 102, 172],
  [103, 169, 207],
  [255, 255, 255],
  [239, 138, 98],
  [178, 24, 43],
];

/** The numbers in a base64 text of little-endian float32. */
export function floatsOf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** The largest absolute value of some maps, at least a little above 0. */
export function largest(maps) {
  let most = 1e-12;
  for (const map of maps) for (const value of map) most = Math.max(most, Math.abs(value));
  return most;
}

/** Paint a map of width x height numbers on a canvas of that size. `limit` has the strongest colour. */
export function paintMap(canvas, map, width, height, limit) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let index = 0; index < map.length; index += 1) {
    const place = colourIndex(map[index] / limit) * 4;
    pixels.data[4 * index] = TABLE[place];
    pixels.data[4 * index + 1] = TABLE[place + 1];
    pixels.data[4 * index + 2] = TABLE[place + 2];
    pixels.data[4 * index + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

/** Paint the scale of colours from left (-1) to right (1). */
export function paintLegend(canvas) {
  const ramp = Float32Array.from({ length: 256 }, (_, index) => (index - 127.5) / 127.5);
  paintMap(canvas, ramp, 256, 1, 1);
}

const LEVELS = 255; // odd, so that 0 has a level of its own
const TABLE = colourTable();

function colourIndex(share) {
  const bounded = Math.min(1, Math.max(-1, share));
  return Math.round(((bounded + 1) / 2) * (LEVELS - 1));
}

function colourTable() {
  const table = new Uint8ClampedArray(LEVELS * 4);
  for (let level = 0; level < LEVELS; level += 1) {
    const place = (level / (LEVELS - 1)) * (STOPS.length - 1);
    const low = Math.min(Math.floor(place), STOPS.length - 2);
    for (let channel = 0; channel < 3; channel += 1) {
      const [from, to] = [STOPS[low][channel], STOPS[low + 1][channel]];
      table[4 * level + channel] = from + (to - from) * (place - low);
    }
  }
  return table;
}

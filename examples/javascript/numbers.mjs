/** Numbers as JavaScript's runtimes take them: they have no bfloat16, and Node 20 no Float16Array. */
import { expect } from './errors.mjs';

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);
const WIDENED = 'the prefix is bound as float32, the same numbers in twice the memory';

/**
 * `data` of dtype `stored` (F32, F16, BF16) as `wanted` (float32, or the bits of float16).
 * @param {(sentence: string) => void} lost hears what the numbers lose on the way, or that they become larger
 */
export function bindable(name, stored, data, wanted, lost) {
  expect(wanted === 'float32' || wanted === 'float16', name, 'float32 or float16, which JavaScript has', wanted);
  if (stored === 'F32' && wanted === 'float32') return data;
  if (stored === 'F16' && wanted === 'float16') return data;
  const read = { F32: (number) => number, F16: fromHalf, BF16: fromBfloat }[stored];
  if (wanted === 'float32') {
    if (stored === 'BF16') lost(`JavaScript has no bfloat16: ${WIDENED}`);
    return Float32Array.from(data, read);
  }
  lost(`the graph takes float16: the prefix's ${stored} numbers are rounded to it`);
  return Uint16Array.from(data, (number) => toHalf(name, read(number)));
}

function fromBfloat(half) {
  bits[0] = half << 16;
  return float[0];
}

function fromHalf(half) {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 0x3ff;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

/** The bits of the nearest float16, ties to even as everywhere. */
function toHalf(name, number) {
  const size = Math.abs(number);
  expect(size < 65520, name, 'numbers up to 65504, the largest of float16', number, 'export the graph in float32');
  const sign = number < 0 || Object.is(number, -0) ? 0x8000 : 0;
  // Below 2^-14 float16 counts in steps of 2^-24, as float32 does from 0.5 on: the sum rounds.
  float[0] = size < 2 ** -14 ? size + 0.5 : size;
  if (size < 2 ** -14) return sign | (bits[0] - 0x3f000000);
  return sign | ((bits[0] - 0x38000000 + 0xfff + ((bits[0] >>> 13) & 1)) >>> 13);
}

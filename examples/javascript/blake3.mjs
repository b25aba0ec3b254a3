/** BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs), unkeyed, 32 bytes out. */

const IV = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];
const PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8];
const [CHUNK_START, CHUNK_END, PARENT, ROOT] = [1, 2, 4, 8];
const [BLOCK, CHUNK] = [64, 1024];

/** Where each of the 7 rounds finds the words of a block. */
const SCHEDULE = [Array.from(PERMUTATION.keys())];
while (SCHEDULE.length < 7) SCHEDULE.push(PERMUTATION.map((place) => SCHEDULE.at(-1)[place]));

/** The digest of bytes (a Uint8Array), as 64 hexadecimal digits. */
export function blake3(bytes) {
  const words = tree(bytes, 0, ROOT);
  return [...new Uint8Array(words.buffer)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** The chaining value of the subtree over `bytes`, whose first chunk is number `counter`. */
function tree(bytes, counter, flags) {
  if (bytes.length <= CHUNK) return chunk(bytes, counter, flags);
  const left = 2 ** Math.floor(Math.log2((bytes.length - 1) / CHUNK));
  const both = new Int32Array(16);
  both.set(tree(bytes.subarray(0, left * CHUNK), counter, 0));
  both.set(tree(bytes.subarray(left * CHUNK), counter + left, 0), 8);
  return compress(Int32Array.from(IV), both, 0, BLOCK, PARENT | flags);
}

function chunk(bytes, counter, flags) {
  const blocks = Math.max(1, Math.ceil(bytes.length / BLOCK));
  const words = new Int32Array(16);
  const into = new Uint8Array(words.buffer);
  let value = Int32Array.from(IV);
  for (let index = 0; index < blocks; index++) {
    const block = bytes.subarray(index * BLOCK, (index + 1) * BLOCK);
    if (block.length < BLOCK) words.fill(0);
    into.set(block);
    const last = index === blocks - 1 ? CHUNK_END | flags : 0;
    value = compress(value, words, counter, block.length, last | (index === 0 ? CHUNK_START : 0));
  }
  return value;
}

function compress(value, words, counter, length, flags) {
  const state = new Int32Array(16);
  state.set(value);
  for (let word = 0; word < 4; word++) state[8 + word] = IV[word];
  state[12] = counter;
  state[13] = counter / 2 ** 32;
  state[14] = length;
  state[15] = flags;
  for (const order of SCHEDULE) round(state, words, order);
  for (let word = 0; word < 8; word++) value[word] = state[word] ^ state[word + 8];
  return value;
}

/** Columns, then diagonals. */
function round(state, words, order) {
  mix(state, 0, 4, 8, 12, words[order[0]], words[order[1]]);
  mix(state, 1, 5, 9, 13, words[order[2]], words[order[3]]);
  mix(state, 2, 6, 10, 14, words[order[4]], words[order[5]]);
  mix(state, 3, 7, 11, 15, words[order[6]], words[order[7]]);
  mix(state, 0, 5, 10, 15, words[order[8]], words[order[9]]);
  mix(state, 1, 6, 11, 12, words[order[10]], words[order[11]]);
  mix(state, 2, 7, 8, 13, words[order[12]], words[order[13]]);
  mix(state, 3, 4, 9, 14, words[order[14]], words[order[15]]);
}

function mix(state, a, b, c, d, first, second) {
  state[a] = (state[a] + state[b] + first) | 0;
  state[d] = rotated(state[d] ^ state[a], 16);
  state[c] = (state[c] + state[d]) | 0;
  state[b] = rotated(state[b] ^ state[c], 12);
  state[a] = (state[a] + state[b] + second) | 0;
  state[d] = rotated(state[d] ^ state[a], 8);
  state[c] = (state[c] + state[d]) | 0;
  state[b] = rotated(state[b] ^ state[c], 7);
}

const rotated = (word, by) => (word >>> by) | (word << (32 - by));

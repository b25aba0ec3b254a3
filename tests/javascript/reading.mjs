/** What is a prefix file, what is none, and what becomes of its numbers. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import { blake3 } from '../../examples/javascript/blake3.mjs';
import { bindable } from '../../examples/javascript/numbers.mjs';
import {
  keysAndValues,
  pastFeeds,
  PrefixError,
  readPrefix,
  slots,
  textFeeds,
  textStart,
} from '../../examples/javascript/prefix.mjs';
import { cases } from './cases.mjs';

const golden = readFileSync(cases.golden);
const refused = (bytes, says = '') => {
  assert.throws(() => readPrefix(bytes), (error) => {
    assert.ok(error instanceof PrefixError, error.stack);
    assert.match(error.message, /^prefix.*: expected .*; found /);
    assert.ok(error.message.includes(says), error.message);
    return error.message.length < 600 && !/[\n\r\x1b]/.test(error.message);
  });
};

class Tensor {
  constructor(type, data, dims) {
    Object.assign(this, { type, data, dims });
  }
}

test('the golden file is read from a buffer, a view and a copy at odd places', () => {
  const odd = new Uint8Array(golden.length + 3).subarray(3);
  odd.set(golden);
  for (const given of [golden, odd, Uint8Array.from(golden).buffer]) {
    const prefix = readPrefix(given);
    const [{ key, value }] = keysAndValues(prefix);
    assert.equal(prefix.manifest.content, 'b3t-v1:2587b1917f6b4390e4dc970b53d8b8ecb2384b4ecc759bcb432b53e582dd9357');
    assert.deepEqual([key.shape, value.shape, key.data.length], [[2, 2, 4], [2, 2, 4], 16]);
    assert.deepEqual([slots(prefix), textStart(prefix)], [2, 2]);
  }
});

test('the golden file is refused when it is cut anywhere', () => {
  for (let length = 0; length < golden.length; length++) refused(golden.subarray(0, length));
});

test('no byte of the golden file can change unnoticed', () => {
  for (let place = 0; place < golden.length; place++) {
    const changed = Uint8Array.from(golden);
    changed[place] ^= 1 << place % 8;
    refused(changed);
  }
});

for (const { name, file, says } of cases.defects) test(`refused: ${name}`, () => refused(readFileSync(file), says));

test('only verification finds another number', () => {
  const changed = Uint8Array.from(golden);
  changed[golden.length - 1] ^= 1;
  refused(changed, 'damaged or edited');
  assert.equal(readPrefix(changed, { verify: false }).tensors.size, 2);
});

test('BLAKE3 of no bytes, and of several chunks', () => {
  // The official test vectors: bytes counted through to 250.
  const counted = (length) => Uint8Array.from({ length }, (_, place) => place % 251);
  assert.equal(blake3(counted(0)), 'af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262');
  assert.equal(blake3(counted(3072)), 'b98cb0ff3623be03326b373de6b9095218513e64f1ee2edd2525c7ad1e5cffd2');
});

test('float16 is the nearest one, and comes back as it is', () => {
  const numbers = Float32Array.from(cases.halves, ([number]) => number);
  const halves = bindable('x', 'F32', numbers, 'float16', () => {});
  assert.deepEqual([...halves], cases.halves.map(([, bits]) => bits));
  const back = bindable('x', 'F16', halves, 'float32', assert.fail);
  assert.deepEqual(bindable('x', 'F32', back, 'float16', () => {}), halves);
});

test('what is lost is said once, and what is not lost is not', () => {
  const heard = [];
  const bind = (dtype, stored) => {
    const prefix = readPrefix(readFileSync(cases.families[0].prefixes[stored].file));
    return pastFeeds(prefix, Tensor, { dtype, lost: (sentence) => heard.push(sentence) });
  };
  bind('float32', 'F32');
  bind('float16', 'F16');
  bind('float32', 'F16');
  assert.deepEqual(heard, []);
  bind('float32', 'BF16');
  assert.match(heard.join(), /^JavaScript has no bfloat16: .* twice the memory$/);
  bind('float16', 'BF16');
  assert.match(heard[1], /rounded/);
  assert.equal(heard.length, 2);
});

test('a prefix for a float16 graph is numpy\'s float16', () => {
  const { prefixes, halves } = cases.families[0];
  const feeds = pastFeeds(readPrefix(readFileSync(prefixes.F32.file)), Tensor, { dtype: 'float16', lost: () => {} });
  for (const [name, bits] of Object.entries(halves)) {
    assert.deepEqual([...feeds[name.replace('decoder.self.layers.', 'past_key_values.')].data], bits);
  }
});

test('rows of several lengths are refused', () => {
  for (const rows of [[[1, 2], [3]], [[]], []]) assert.throws(() => textFeeds(rows, Tensor), { name: 'PrefixError' });
  const { position_ids: positions, attention_mask: mask } = textFeeds([[5, 6], [7, 8]], Tensor, { past: 3, position: 1 });
  assert.deepEqual([...positions.data], [1n, 2n, 1n, 2n]);
  assert.deepEqual([mask.dims, mask.data.length], [[2, 5], 10]);
});

test('numbers that float16 cannot hold, and types that JavaScript has not, are refused', () => {
  const prefix = readPrefix(readFileSync(cases.large));
  assert.throws(() => pastFeeds(prefix, Tensor, { dtype: 'float16', lost: () => {} }), /up to 65504.*found 70000/);
  assert.throws(() => pastFeeds(prefix, Tensor, { dtype: 'bfloat16' }), /which JavaScript has; found bfloat16/);
});

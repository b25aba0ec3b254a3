/** The usage contract: the ids that prefixkit itself gives. */
import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Tokenizer } from '@huggingface/tokenizers';
import {
  decodeTarget,
  encodePrompt,
  inputFields,
  stopIds,
  taskTokenizer,
} from '../../examples/javascript/prefix.mjs';
import { cases, json } from './cases.mjs';

const tokenizerIn = (folder) =>
  taskTokenizer(Tokenizer, json(`${folder}/tokenizer.json`), json(`${folder}/tokenizer_config.json`));

for (const { name, folder, task, asked } of cases.prompts) {
  const tokenizer = tokenizerIn(folder);
  for (const { text, ids } of asked) {
    test(`${name} asked ${JSON.stringify(text)}, BOS ${tokenizer.bos}`, () => {
      assert.deepEqual(encodePrompt(task, text, tokenizer), ids);
      assert.deepEqual(encodePrompt(task, { input: text }, tokenizer), ids);
    });
  }
}

const { folder, task } = cases.prompts[0];
const tokenizer = tokenizerIn(folder);

test('an answer ends at its stop token and keeps its spaces', () => {
  const ids = tokenizer.encode(' a pub by the riverside .');
  const written = [...ids, ...stopIds(task, tokenizer), ...ids];
  assert.equal(decodeTarget(task, written, tokenizer), 'a pub by the riverside .');
});

test('what the task does not say is refused', () => {
  const says = (changes, fields, message) => {
    const asking = () => encodePrompt({ ...task, ...changes }, fields, tokenizer);
    assert.throws(asking, { name: 'PrefixError', message });
  };
  says({}, { other: 'x' }, /expected the fields input; found other/);
  says({}, { input: 3 }, /expected Unicode text as input/);
  says({}, 'half \ud83d', /expected Unicode text as input/);
  says({}, 'long '.repeat(40), /at most 48 tokens, which leave 16 of the task's 64; found \d+; shorten it/);
  says({ input_template: 'a { b' }, 'x', /fields written \{name\}; found \{; write a brace as/);
  says({ input_template: '{slot} {input}' }, 'x', /fields written/);
  says({ chat_template_hash: 'b3-v1:0' }, 'x', /a conversation/);
  const several = { ...task, input_template: '{question} {{no}} {context} {question}' };
  assert.deepEqual(inputFields(several), ['question', 'context']);
  assert.throws(() => stopIds({ ...task, stop: ['a pub'] }, tokenizer), /exactly one token/);
});

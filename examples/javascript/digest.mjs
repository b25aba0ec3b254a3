/** The digest that finds damage: schemas/README.md, section 6. */
import { blake3 } from './blake3.mjs';
import { expect } from './errors.mjs';

const TAG = 'b3t-v1:';
const utf8 = (text) => new TextEncoder().encode(text);

/**
 * Throws where tensors and manifest do not have the digest that the manifest states.
 * @param {string} stored the manifest as it stands in the file: writers make it canonical
 */
export function checkContent(stored, { content }, tensors, where) {
  expect(typeof content === 'string' && content.startsWith(TAG), where, `content that begins with ${TAG}`, content);
  const rest = utf8(stored.replace(`"content":"${content}",`, ''));
  const bytes = ({ data }) => new Uint8Array(data.buffer);
  const lines = [...tensors].map(([name, tensor]) => line(name, tensor.dtype, tensor.shape, bytes(tensor)));
  const root = TAG + blake3(utf8([line('__metadata__', 'JSON', [], rest), ...lines].sort().join('')));
  expect(root === content, where, `${root}, the digest of the content`, `${content} (damaged or edited)`);
}

const line = (name, dtype, shape, bytes) => `${name}\0${dtype}\0${shape.join()}\0${blake3(bytes)}\n`;

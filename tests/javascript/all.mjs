/** All tests in one process: a process for each file would load each runtime anew. */
import './reading.mjs';
import './asking.mjs';
import './runtimes.mjs';

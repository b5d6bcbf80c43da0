/* Work in parts, on as many threads as torch is set to use. */
#pragma once

typedef void (*syncnorm_part)(void *work, long part);

/* Does parts 0 to parts - 1, each once, in any order, on up to `threads` threads, this one among them. */
void syncnorm_parallel(syncnorm_part run, void *work, long parts, int threads);

// Every kernel: one program.
#include "images.cu"
#include "modulation.cu"
#include "noise.cu"
#include "signals.cu"
#include "update.cu"

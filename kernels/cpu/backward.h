#pragma once
#include "attention.h"
namespace tokenmix::cpu { namespace {
inline void backward_pass(const Backward&, const Threads&) {}
}}

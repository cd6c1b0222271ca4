/* Element types to float and back: round to nearest even; fp8 saturates, as the library's does. */
#include "emu.h"

#include <math.h>
#include <string.h>

typedef struct { int exponent_bits, mantissa_bits, bias; bool has_inf; } format_t;

static const format_t F16 = {5, 10, 15, true}, E4M3 = {4, 3, 7, false}, E5M2 = {5, 2, 15, true};

int dtype_size(int dtype) {
    switch (dtype) {
    case R_16F: case R_16BF: return 2;
    case R_8I: case R_E4M3: case R_E5M2: return 1;
    case R_32F: case R_32I: return 4;
    default: return 0;
    }
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float decode(uint32_t bits, format_t f) {
    uint32_t mantissa = bits & ((1u << f.mantissa_bits) - 1);
    uint32_t top = (1u << f.exponent_bits) - 1;
    uint32_t exponent = (bits >> f.mantissa_bits) & top;
    uint32_t sign = (bits >> (f.exponent_bits + f.mantissa_bits)) << 31;
    uint32_t wide = mantissa << (23 - f.mantissa_bits);
    bool all_ones = mantissa == (1u << f.mantissa_bits) - 1;
    if (exponent == top && (f.has_inf || all_ones)) return from_bits(sign | 0x7F800000u | wide);
    if (exponent != 0) return from_bits(sign | (exponent + 127 - f.bias) << 23 | wide);
    float small = ldexpf((float)mantissa, 1 - f.bias - f.mantissa_bits);
    return sign ? -small : small;
}

static uint32_t encode(float value, format_t f, bool saturate) {
    uint32_t sign = (to_bits(value) >> 31) << (f.exponent_bits + f.mantissa_bits);
    uint32_t top = (1u << f.exponent_bits) - 1;
    uint32_t nan = top << f.mantissa_bits | ((1u << f.mantissa_bits) - 1);
    uint32_t infinity = top << f.mantissa_bits;
    uint32_t largest = f.has_inf ? infinity - 1 : nan - 1;
    if (isnan(value)) return sign | nan;
    float magnitude = fabsf(value);
    if (isinf(magnitude)) return sign | (saturate ? largest : infinity);
    if (magnitude == 0) return sign;
    int exponent;
    frexpf(magnitude, &exponent);
    int lowest = 1 - f.bias;
    int scale = exponent - 1 < lowest ? lowest : exponent - 1;
    uint32_t units = (uint32_t)rintf(ldexpf(magnitude, f.mantissa_bits - scale));
    /* Units may carry into the exponent: adding them to the shifted exponent does just that. */
    uint32_t base = (uint32_t)(scale + f.bias - 1) << f.mantissa_bits;
    uint32_t bits = base + units;
    if (bits > largest) bits = saturate ? largest : infinity;
    return sign | bits;
}

static uint16_t encode_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

double load_number(const void *base, int64_t index, int dtype) {
    switch (dtype) {
    case R_16BF: return from_bits((uint32_t)((const uint16_t *)base)[index] << 16);
    case R_16F: return decode(((const uint16_t *)base)[index], F16);
    case R_E4M3: return decode(((const uint8_t *)base)[index], E4M3);
    case R_E5M2: return decode(((const uint8_t *)base)[index], E5M2);
    case R_8I: return ((const int8_t *)base)[index];
    case R_32I: return ((const int32_t *)base)[index];
    default: return ((const float *)base)[index];
    }
}

static double clamp(double value, double low, double high) {
    return !(value > low) ? low : value > high ? high : value;
}

void store_number(void *base, int64_t index, int dtype, double value) {
    switch (dtype) {
    case R_16BF: ((uint16_t *)base)[index] = encode_bf16((float)value); break;
    case R_16F: ((uint16_t *)base)[index] = (uint16_t)encode((float)value, F16, false); break;
    case R_E4M3: ((uint8_t *)base)[index] = (uint8_t)encode((float)value, E4M3, true); break;
    case R_E5M2: ((uint8_t *)base)[index] = (uint8_t)encode((float)value, E5M2, true); break;
    case R_8I: ((int8_t *)base)[index] = (int8_t)clamp(rint(value), -128, 127); break;
    case R_32I:
        ((int32_t *)base)[index] = (int32_t)clamp(rint(value), INT32_MIN, INT32_MAX);
        break;
    default: ((float *)base)[index] = (float)value;
    }
}

/* Both zeros count as zero; a NaN does not. */
bool is_zero(const void *base, int64_t index, int dtype) {
    switch (dtype_size(dtype)) {
    case 1: {
        uint8_t bits = ((const uint8_t *)base)[index];
        return dtype == R_8I ? bits == 0 : (bits & 0x7F) == 0;
    }
    case 2: return (((const uint16_t *)base)[index] & 0x7FFF) == 0;
    default: return (((const uint32_t *)base)[index] & 0x7FFFFFFF) == 0;
    }
}

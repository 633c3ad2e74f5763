# Fails if the portable kernel among the OBJECTS (separated by |) multiplies and adds without NEON.
string(REPLACE "|" ";" objects "${OBJECTS}")
list(FILTER objects INCLUDE REGEX "portable")
execute_process(COMMAND ${OBJDUMP} -d --no-show-raw-insn ${objects}
                OUTPUT_VARIABLE instructions COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "\tfmla\tv[0-9]+\\.4s" fused "${instructions}")
list(LENGTH fused count)
message("${count} FMLA instructions of four floats")
if(count LESS 100)
  message(FATAL_ERROR "expected the matrix product's hundreds of FMLA instructions, found ${count}")
endif()

# Fails if one of the OBJECTS (separated by |) defines a weak symbol, or if that of an instruction
# set defines another one than its table. Of a symbol that several objects define, the linker keeps
# any: a template of the standard library, compiled for AVX-512, would then run everywhere.
string(REPLACE "|" ";" objects "${OBJECTS}")
set(faults "")
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} -C --defined-only --extern-only ${object}
                  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  get_filename_component(name ${object} NAME)
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES "^[0-9a-f]* *[VWu] ")
      string(APPEND faults "${name}: weak: ${symbol}\n")
    elseif(symbol AND name MATCHES "^(portable|avx2|avx512)" AND NOT symbol MATCHES "_kernels$")
      string(APPEND faults "${name}: more than its table: ${symbol}\n")
    endif()
  endforeach()
endforeach()
if(faults)
  message(FATAL_ERROR "${faults}")
endif()
